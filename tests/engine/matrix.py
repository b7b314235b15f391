"""Every engine at every world size against one process, and every checkpoint under every engine.

`python tests/engine/matrix.py --out matrix.json` runs all of it (minutes on two cores); the test suite takes a part.
The setting: a small model with spectrally normalised matrices, fp32, no dropout, lr 3e-4 with 100 warm-up steps.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]

from support.distributed import run_ranks

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

SIZES = {
    "single": (1,),
    "ddp": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "hsdp": (4,),
    "zero1": (1, 2, 3, 4),
    "zero2": (1, 2, 3, 4),
    "zero3": (1, 2, 3, 4),
}
BATCH, SEQ, VOCABULARY = 12, 16, 96
Cell = tuple[str, int]
"""An engine kind and a world size."""


def cells() -> list[Cell]:
    return [(kind, size) for kind, sizes in SIZES.items() for size in sizes]


def configuration(*overrides: str) -> Config:
    """A resolved configuration of the setting; `overrides` as on the command line."""
    base = [
        *("model.method=magneto_sigma", "model.n_layers=4", "model.d_model=32", "model.n_heads=4"),
        *(f"model.vocab_size={VOCABULARY}", f"data.seq_len={SEQ}", "engine.unit_bytes=30000"),
        *("train.steps=20", "train.lr=3e-4", "train.warmup_steps=100", f"train.global_batch_size={BATCH}"),
    ]
    loaded = load([], [*base, *overrides]).config
    return resolve(loaded, pieces=VOCABULARY, world_size=1, accelerate_precision=None)


def make_ranks(rank: int, world_size: int) -> Ranks:
    """The ranks of the process group that exists; this process alone if there is none."""
    group = dist.group.WORLD if dist.is_initialized() else None
    return Ranks(rank, world_size, torch.device("cpu"), group, group, group)


def run_steps(engine: Engine, ranks: Ranks, config: Config, first: int, last: int, micro: int = 0) -> list[float]:
    """Mean losses of the steps `first` ... `last`, on rows that depend on the step alone."""
    losses = []
    for step in range(first, last + 1):
        rows = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
        own = rows[ranks.rank :: ranks.world_size]
        rate = learning_rate(step, config.train)
        result = train_step(engine, ranks, own[:, :-1], own[:, 1:], step=step, lr=rate, seed=0, micro=micro or len(own))
        total = result.cross_entropy.double()
        if ranks.cpu_group is not None:
            dist.all_reduce(total, group=ranks.cpu_group)
        losses.append(float(total) / (BATCH * SEQ))
    return losses


def single(*overrides: str, steps: int = 20) -> list[float]:
    """The losses of one process."""
    config, ranks = configuration(*overrides), Ranks(0, 1, torch.device("cpu"), None, None)
    return run_steps(build_engine(config, "single", ranks), ranks, config, 1, steps)


def worst(found: list[float], expected: list[float]) -> float:
    """Largest relative difference of two curves."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def train_kinds(rank: int, world_size: int, kinds: list[str], overrides: list[str], steps: int) -> dict:
    """Losses by kind, one engine after the other on the same ranks; accumulates two micro-batches."""
    ranks, config = make_ranks(rank, world_size), configuration(*overrides)
    micro = BATCH // world_size // 2
    return {kind: run_steps(build_engine(config, kind, ranks), ranks, config, 1, steps, micro=micro) for kind in kinds}


def save_kinds(rank: int, world_size: int, kinds: list[str], folder: str, steps: int) -> None:
    """Each kind trains `steps` steps and saves into `folder/<kind>-<world size>`."""
    ranks, config = make_ranks(rank, world_size), configuration()
    for kind in kinds:
        engine = build_engine(config, kind, ranks)
        run_steps(engine, ranks, config, 1, steps)
        save_tensors(Path(folder) / f"{kind}-{world_size}", engine.tensors(), ranks.cpu_group)


def load_kinds(rank: int, world_size: int, kinds: list[str], folder: str, steps: int, sources: list[Cell]) -> dict:
    """Each kind loads every source in turn: as many losses more by (kind, source)."""
    ranks, config = make_ranks(rank, world_size), configuration()
    found = {}
    for kind in kinds:
        engine = build_engine(config, kind, ranks)
        for source in sources:
            load_tensors(Path(folder) / f"{source[0]}-{source[1]}", engine.tensors(), ranks.cpu_group)
            engine.loaded()
            found[kind, source] = run_steps(engine, ranks, config, steps + 1, 2 * steps)
    return found


def _kinds_of(world_size: int, chosen: list[Cell]) -> list[str]:
    return [kind for kind, size in chosen if size == world_size]


def launch(function, world_size: int, *arguments) -> dict:
    """Rank 0's result; kinds that work without a process group share the launch of one rank."""
    return run_ranks(function, world_size, *arguments, timeout=1500)[0]


def equality(chosen: list[Cell], overrides: list[str], steps: int = 20) -> dict[Cell, float]:
    """The worst relative difference of each cell's losses to those of one process."""
    expected = single(*overrides, steps=steps)
    found = {}
    for size in sorted({size for _, size in chosen}):
        losses = launch(train_kinds, size, _kinds_of(size, chosen), overrides, steps)
        found |= {(kind, size): worst(curve, expected) for kind, curve in losses.items()}
    return found


def checkpoints(
    sources: list[Cell], targets: list[Cell], folder: str, steps: int = 5
) -> dict[tuple[Cell, Cell], float]:
    """The worst relative difference of the losses to the uninterrupted run's, by (source, target).

    Each source saves after `steps` steps, each target goes on for as many.
    """
    expected = single(steps=2 * steps)[steps:]
    for size in sorted({size for _, size in sources}):
        launch(save_kinds, size, _kinds_of(size, sources), folder, steps)
    found = {}
    for size in sorted({size for _, size in targets}):
        losses = launch(load_kinds, size, _kinds_of(size, targets), folder, steps, sources)
        found |= {(source, (kind, size)): worst(curve, expected) for (kind, source), curve in losses.items()}
    return found


DEEP = {"12": "model.n_layers=12", "192": "model.n_layers=192"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go (JSON)")
    parser.add_argument("--only", choices=("equality", "bf16", "checkpoints"), help="one part")
    arguments = parser.parse_args()
    told: dict = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    parts = [arguments.only] if arguments.only else ["equality", "bf16", "checkpoints"]
    if "equality" in parts:
        told["fp32"] = _named(equality(cells(), []))
        told["fp64"] = _named(equality([c for c in cells() if "zero" not in c[0]], ["train.precision=fp64"]))
    if "bf16" in parts:
        few = [cell for cell in cells() if cell[1] in (1, 2) or cell[0] == "hsdp"]
        for depth, override in DEEP.items():
            told[f"bf16-{depth}"] = _named(equality(few, [override, "train.precision=bf16", "model.d_model=16"]))
    if "checkpoints" in parts:
        with tempfile.TemporaryDirectory() as folder:
            pairs = checkpoints(cells(), cells(), folder)
        told["checkpoints"] = {f"{s[0]}-{s[1]} -> {t[0]}-{t[1]}": error for (s, t), error in pairs.items()}
    arguments.out.write_text(json.dumps(told, indent=1) + "\n")
    for name, figures in told.items():
        at = max(figures, key=figures.get)
        print(f"{name}: {len(figures)} cells, worst {figures[at]:.1e} ({at})")


def _named(found: dict[Cell, float]) -> dict[str, float]:
    return {f"{kind}-{size}": error for (kind, size), error in found.items()}


if __name__ == "__main__":
    main()
