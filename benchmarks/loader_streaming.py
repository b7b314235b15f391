"""Rates of `loader_contestants`: in slices in turns on one core, in passes in turns on two."""

import os
import random
import statistics
import time
from collections.abc import Iterator

from loader_contestants import BATCH, SEQ_LEN, Contestant

# Tokens of a slice: about 50 ms, so that what else the machine does falls on all contestants alike.
SLICE = 12 * BATCH * SEQ_LEN
SLICES = 24  # of a round
# Tokens of a pass that are not counted: processes start, files are opened.
WARM_UP = 20 * BATCH * SEQ_LEN

Rates = dict[str, list[float]]


def pin(cores: int) -> None:
    """This process and those it starts stay on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])


class _Runner:
    """A contestant which is stopped and goes on, and begins again when its text is over."""

    def __init__(self, contestant: Contestant):
        self._contestant = contestant
        self._running: Iterator[int] = iter(())

    def run(self, tokens: int) -> int:
        done = 0
        while done < tokens:
            made = next(self._running, None)
            if made is None:
                self._running = self._contestant()
            else:
                done += made
        return done


def in_slices(contestants: dict[str, Contestant], rounds: int) -> tuple[Rates, Rates]:
    """(tokens a second of wall time, of CPU time) in each round, which consists of SLICES slices of each."""
    runners = {name: _Runner(contestant) for name, contestant in contestants.items()}
    draw = random.Random(0)
    for runner in runners.values():
        runner.run(SLICE)
    wall: Rates = {name: [] for name in contestants}
    cpu: Rates = {name: [] for name in contestants}
    for _ in range(rounds):
        spent: dict[str, tuple[int, float, float]] = dict.fromkeys(contestants, (0, 0.0, 0.0))
        for _ in range(SLICES):
            for name in draw.sample(list(contestants), len(contestants)):
                began = time.perf_counter(), time.process_time()
                done = runners[name].run(SLICE)
                ended = time.perf_counter(), time.process_time()
                tokens, by_wall, by_cpu = spent[name]
                spent[name] = tokens + done, by_wall + ended[0] - began[0], by_cpu + ended[1] - began[1]
        for name, (tokens, by_wall, by_cpu) in spent.items():
            wall[name].append(tokens / by_wall)
            cpu[name].append(tokens / by_cpu)
    return wall, cpu


def in_passes(contestants: dict[str, Contestant], rounds: int, tokens: int) -> Rates:
    """Tokens a second of wall time in each round, over a pass of so many tokens after the warm-up."""
    rates: Rates = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            runner = _Runner(contestant)
            runner.run(WARM_UP)
            began = time.perf_counter()
            done = runner.run(tokens)
            rates[name].append(done / (time.perf_counter() - began))
            del runner  # ends what it has started
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
