"""Rates of `loader_contestants`: in slices in turns on one core, in passes in turns on two."""

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from loader_contestants import BATCH, SEQ_LEN, Contestant

# Tokens of a slice: under half a second, so that what else the machine does falls on all contestants alike.
SLICE = 60 * BATCH * SEQ_LEN
SLICES = 4  # of a round
# Tokens of a pass that are not counted: processes start, files are opened.
WARM_UP = 20 * BATCH * SEQ_LEN

Rates = dict[str, list[float]]


def pin(cores: int) -> None:
    """This process and those it starts stay on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


class _Runner:
    """A contestant in a process of its own, which is told when to go on, and begins again when its text is over."""

    def __init__(self, contestant: Contestant):
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(contestant, theirs))
        self._process.start()

    def run(self, tokens: int) -> tuple[int, float, float]:
        """(tokens made, seconds of wall time, seconds of its CPU time) of at least so many tokens."""
        self._ours.send(tokens)
        return self._ours.recv()

    def end(self) -> None:
        self._ours.send(0)
        self._process.join()


def _serve(contestant: Contestant, connection: Connection) -> None:
    running: Iterator[int] = iter(())
    while tokens := connection.recv():
        began, done = (time.perf_counter(), time.process_time()), 0
        while done < tokens:
            made = next(running, None)
            if made is None:
                running = contestant()
            else:
                done += made
        connection.send((done, time.perf_counter() - began[0], time.process_time() - began[1]))


def in_slices(contestants: dict[str, Contestant], rounds: int) -> tuple[Rates, Rates]:
    """(tokens a second of wall time, of CPU time) in each round, which consists of SLICES slices of each."""
    runners = {name: _Runner(contestant) for name, contestant in contestants.items()}
    draw = random.Random(0)
    for runner in runners.values():
        runner.run(SLICE)
    wall: Rates = {name: [] for name in contestants}
    cpu: Rates = {name: [] for name in contestants}
    for _ in range(rounds):
        spent: dict[str, list[tuple[int, float, float]]] = {name: [] for name in contestants}
        for _ in range(SLICES):
            for name in draw.sample(list(contestants), len(contestants)):
                spent[name].append(runners[name].run(SLICE))
        for name, slices in spent.items():
            tokens, by_wall, by_cpu = map(sum, zip(*slices, strict=True))
            wall[name].append(tokens / by_wall)
            cpu[name].append(tokens / by_cpu)
    for runner in runners.values():
        runner.end()
    return wall, cpu


def in_passes(contestants: dict[str, Contestant], rounds: int, tokens: int) -> Rates:
    """Tokens a second of wall time in each round, over a pass of so many tokens after the warm-up."""
    rates: Rates = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            runner = _Runner(contestant)
            runner.run(WARM_UP)
            done, seconds, _ = runner.run(tokens)
            rates[name].append(done / seconds)
            runner.end()
    return rates


def records(rates: Rates, shape: str, metric: str, *, base: str) -> list[dict]:
    """Rates with quartiles, and their ratios to `base` of the same round."""
    made = []
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, rates[base], strict=True)]
        made.append(record(name, shape, f"{metric}_rate", values, "tokens/s"))
        made.append(record(name, shape, f"{metric}_ratio", ratios, f"of {base}"))
    return made


def record(name: str, shape: str, metric: str, numbers: list[float], unit: str) -> dict:
    """Median and quartiles (with few numbers: the extremes)."""
    low, high = min(numbers), max(numbers)
    if len(numbers) >= 5:
        low, _, high = statistics.quantiles(numbers, n=4)
    return {
        "name": name,
        "shape": shape,
        "metric": metric,
        "median": statistics.median(numbers),
        "low": low,
        "high": high,
        "unit": unit,
    }
