"""Methods with state or shapes of their own train alike in one process, recomputed, accumulated, compiled and sharded."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.checkpoint.portable import load_tensors, save_tensors
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods import spectral
from stablelm.model.linear import Linear
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
ROWS, PIECES, STEPS = 12, 96, 20
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
# Beside sigma: a stream that grows, one with vectors of every length, values across layers, parameters of one element.
OTHERS = ("catformer", "denseformer", "value_residual", "rezero")
SIZES = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.kv_heads=2", "data.seq_len=16")
TRAINING = ("train.steps=20", "train.lr=3e-4", "train.warmup_steps=100", f"train.global_batch_size={ROWS}")


def make_config(method: str, *overrides: str) -> Config:
    config = load([], [f"model.method={method}", *SIZES, *TRAINING, *overrides]).config
    return resolve(config, pieces=PIECES, world_size=1, accelerate_precision=None)


def train(engine: TorchEngine, config: Config, ranks: Ranks, *, micro: int = ROWS, steps: range = range(STEPS)):
    """This rank's share of the mean loss at each of the steps."""
    shares = []
    for step in (index + 1 for index in steps):
        text = torch.randint(PIECES, (ROWS, 17), generator=torch.Generator().manual_seed(0))
        rows = text[ranks.rank :: ranks.world_size]
        lr = learning_rate(step, config.train)
        found = train_step(engine, ranks, rows[:, :-1], rows[:, 1:], step=step, lr=lr, seed=0, micro=micro)
        shares.append(float(found.cross_entropy) / (ROWS * 16))
    return shares


@cache
def alone(method: str, precision: str) -> list[float]:
    """Losses of one process with the whole batch at once."""
    config = make_config(method, f"train.precision={precision}")
    return train(TorchEngine(config, "single", SINGLE), config, SINGLE)


def assert_same(found: list[float], method: str, precision: str) -> None:
    wanted = alone(method, precision)
    assert len(found) == len(wanted) == STEPS
    assert wanted[0] - wanted[-1] > 1e-3  # it learned
    assert found == pytest.approx(wanted, rel=TOLERANCE[precision])
