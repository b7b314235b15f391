"""What each optimizer costs: a step's time and the bytes of its state, beside AdamW's.

    python benchmarks/optimizers.py [--shape 24x512x1x256] [--rounds 20] [--compile] [--only lion] [--out FILE.json]

The step is forward, backward, clip and update of `pre_ln` at layers x d_model x batch x seq_len in one process.
Variants take turns in each round. Where steps differ (sophia, looksam), a round takes as many as repeat and gives
their mean. Medians come with their quartiles; ratios are of the same round.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from added_code import Shape
from chunked_loss import seconds
from methods import record, text_of
from out_path import out_path
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.peak_memory import rank_memory
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.train.step import train_step

BASE = "adamw"
VARIANTS: dict[str, tuple[str, ...]] = {
    BASE: (),
    "adamw, eps inside": ("train.eps_inside=true",),
    "adamw, ema": ("train.ema=0.999",),
    "muon": ("train.optimizer=muon",),
    "muon, qk_clip": ("train.optimizer=muon", "train.muon.qk_clip=100"),
    "sophia": ("train.optimizer=sophia",),
    "sam": ("train.optimizer=sam",),
    "looksam": ("train.optimizer=looksam",),
    "stable_adamw": ("train.optimizer=stable_adamw",),
    "lion": ("train.optimizer=lion",),
    "schedule_free": ("train.optimizer=schedule_free", "train.schedule=constant"),
}


@dataclass(frozen=True)
class Variant:
    """`step` takes one of `period` steps that repeat."""

    config: Config
    step: Callable[[], None]
    period: int

    def round(self) -> None:
        for _ in range(self.period):
            self.step()


def config_of(overrides: tuple[str, ...], shape: Shape, options: argparse.Namespace) -> Config:
    settings = [
        *("model.method=pre_ln", "model.activation=gelu", "train.steps=1", f"train.precision={options.precision}"),
        *(f"model.n_layers={shape.n_layers}", f"model.d_model={shape.d_model}", f"data.seq_len={shape.seq_len}"),
        *(f"model.n_heads={max(1, shape.d_model // 64)}", f"train.global_batch_size={shape.batch}"),
        f"train.compile={str(options.compile).lower()}",
    ]
    loaded = load([], [*settings, *overrides])
    return resolve(loaded.config, pieces=options.vocab, world_size=1, accelerate_precision=None)


def variant(config: Config, text: Tensor, ranks: Ranks) -> Variant:
    engine, steps = TorchEngine(config, "single", ranks), count(1)
    tokens, targets = text[:, :-1], text[:, 1:].contiguous()

    def step() -> None:
        train_step(engine, ranks, tokens, targets, step=next(steps), lr=1e-4, seed=0, micro=len(tokens))

    train = config.train
    return Variant(config, step, {"sophia": train.sophia.every, "looksam": train.sam.every}.get(train.optimizer, 1))


def state_bytes(config: Config) -> int:
    layout = rank_memory.make_layout(config, "single", 1, 1)
    return rank_memory.resting(config, rank_memory.parameters(config), layout)["moments"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="24x512x1x256", help="layers x d_model x batch x seq_len")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="names after a comma; adamw is always among them")
    parser.add_argument("--out", type=out_path)
    options = parser.parse_args()
    shape = Shape(*(int(size) for size in options.shape.split("x")))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks, text = Ranks(0, 1, device, None, None), text_of(shape, options.vocab).to(device)
    chosen = {BASE, *options.only.split(",")} if options.only else set(VARIANTS)
    variants = {
        name: variant(config_of(overrides, shape, options), text, ranks)
        for name, overrides in VARIANTS.items()
        if name in chosen
    }
    for each in variants.values():
        each.step()  # warms up
    took: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, each in variants.items():
            took[name].append(seconds(each.round, device) / each.period)
    records: list[dict[str, Any]] = []
    print(f"{'':20}{'ms':>9}{'to adamw':>22}{'state':>10}")
    for name, each in variants.items():
        ratios = [own / base for own, base in zip(took[name], took[BASE], strict=True)]
        held = state_bytes(each.config)
        records += [
            record(name, shape, "step_seconds", took[name], "s"),
            record(name, shape, "step_ratio", ratios, f"of {BASE}"),
            record(name, shape, "state_bytes", [held], "bytes"),
        ]
        time, ratio = records[-3], records[-2]
        spread = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
        print(f"{name:20}{1e3 * time['median']:9.1f}{spread:>22}{held / 2**20:7.0f} MiB")
    if options.out:
        options.out.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
