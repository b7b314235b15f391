"""What guards, heartbeat and the agreement on stops add to a training step: their code alone, against the step.

    python benchmarks/guards.py [--shape 24x512x1x256] [--steps 5] [--ranks 2] [--out FILE.json]

The step is forward, backward, clip and AdamW of `pre_ln` at layers x d_model x batch x seq_len in one process. The
added code is everything that a run does for them in every step: the verdict on the norm and the loss, sums that leave
a skipped step out, the window of past figures, the marker, wishes to stop, and the sum over `--ranks` gloo processes;
the threads of heartbeat and watchdog run meanwhile. It is made many times in a row, so the sum over ranks is waited
for, which a step never does. Medians come with their quartiles.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from added_code import Shape
from chunked_loss import seconds
from methods import config_of, record, step_of, text_of
from out_path import out_path
from torch.multiprocessing.spawn import spawn

from stablelm.config.schema import Config, GuardsConfig, ObserveConfig, RunConfig
from stablelm.engine.interface import StepResult
from stablelm.engine.optimizers import refused
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.observe.interval_metrics import Interval, IntervalMetrics
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import Records
from stablelm.supervise.heartbeat import Watchdog
from stablelm.train.guards import Guard
from stablelm.train.stop import Outcome, StepExchange, Stop

REPEATS, ROUNDS = 50, 20


def added(config: Config, ranks: Ranks) -> tuple[Callable[[], None], Callable[[], None]]:
    """The code of one step that is there for guards, heartbeat and stops, on figures that are at hand; and its end."""
    device, progress = ranks.device, Progress()
    watch = Watchdog(config, ranks, ["here"] * ranks.world_size, 1, lambda code, words: None)
    watch.start()
    guard = Guard(config.guards, progress, print)
    guard.judge([Outcome(step, step, 3 + step % 7 / 100, 1 + step % 5 / 100, False) for step in range(-300, 0)])
    stop, agreement = Stop(ranks, deadline=time.time() + 1e6), StepExchange(ranks)
    silent = Records(config, progress, first_rank=False)
    meter = IntervalMetrics(device, ranks, config, progress, silent, lambda step: config.train.lr)
    numbers = [torch.tensor(value, device=device) for value in (3.0, 100, 1.0)]
    count = iter(range(1, 1_000_000))

    def work() -> None:
        step = next(count)
        watch.marker.at("data", step)
        watch.marker.at("step", step)
        largest = guard.largest_norm(step)
        for place in ("batch sizes", "micro-batch 1 of 1", "update"):
            watch.marker.reached(place)
        _ = numbers[0] / numbers[1] * (1 + 0 * numbers[0].detach())
        skipped = refused(numbers[2], largest)
        skipped.float()
        result = StepResult(numbers[0], numbers[1], numbers[2], refused(numbers[2], largest))
        meter.add(result, wait=0.0, own=0.0, seconds=0.0)
        watch.marker.finished(step)
        _, outcomes = agreement.exchange(step, step, result, stop.request())
        guard.judge(outcomes)

    def end() -> None:
        agreement.settle()
        watch.stop()

    return work, end


def before(ranks: Ranks) -> Callable[[], None]:
    """What the sums of a step's figures took without guards."""
    interval = Interval(ranks.device)
    numbers = [torch.tensor(value, device=ranks.device) for value in (3.0, 100, 1.0)]

    def work() -> None:
        _ = numbers[0] / numbers[1]
        for name, number in zip(("cross_entropy", "valid", "grad_norm"), numbers, strict=True):
            interval.add(name, number)
        interval.add("wait", 0.0)
        interval.add("seconds", 0.0)

    return work


def repeat(work: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        work()


def time_added(rank: int, world_size: int, store: str, folder: str, config: Config) -> None:
    """On one of the ranks: seconds a step of the added code, less what it replaces, left in `folder` by rank 0."""
    torch.set_num_threads(1)
    group = None
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        group = dist.group.WORLD
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = Ranks(rank, world_size, device, group, group)
    guards, observe = GuardsConfig(spike="skip"), ObserveConfig(hang_seconds=1e6)
    config = replace(config, run=RunConfig(dir=folder), guards=guards, observe=observe)
    work, end = added(config, ranks)
    works = {"added": work, "before": before(ranks)}
    took: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(ROUNDS + 2):
        for name, each in works.items():
            value = seconds(partial(repeat, each), device) / REPEATS
            if round_ >= 2:
                took[name].append(value)
    end()
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        less = [a - b for a, b in zip(took["added"], took["before"], strict=True)]
        (Path(folder) / "seconds.json").write_text(json.dumps(less))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="24x512x1x256", help="layers x d_model x batch x seq_len")
    parser.add_argument("--steps", type=int, default=5, help="steps timed, after one that warms up")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    shape = Shape(*(int(size) for size in options.shape.split("x")))
    config = config_of("pre_ln", shape, options)
    with tempfile.TemporaryDirectory() as folder:
        spawn(time_added, (options.ranks, os.path.join(folder, "store"), folder, config), nprocs=options.ranks)
        alone = json.loads((Path(folder) / "seconds.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = TorchEngine(config, "single", Ranks(0, 1, device, None, None))
    step = step_of(engine, text_of(shape, options.vocab).to(device))
    took = [seconds(step, device) for _ in range(options.steps + 1)][1:]
    share = [value / sorted(took)[len(took) // 2] for value in alone]
    records: list[dict[str, Any]] = [
        record("pre_ln", shape, "step_seconds", took, "s"),
        record(f"guards, {options.ranks} ranks", shape, "added_seconds", alone, "s"),
        record(f"guards, {options.ranks} ranks", shape, "added_share", share, "of a step"),
    ]
    for told in records:
        print(f"{told['name']:20} {told['metric']:14} {told['median']:.3g} ({told['low']:.3g} to {told['high']:.3g})")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
