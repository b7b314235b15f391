"""A small model in fp64 with an engine of one process, and text for it."""

from functools import lru_cache

import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
PIECES = 90


@lru_cache
def configured(*overrides: str) -> Config:
    tiny = ["model.n_layers=3", "model.d_model=32", "model.n_heads=4", "train.steps=5", "data.seq_len=12"]
    loaded = load([], [*tiny, "train.precision=fp64", *overrides]).config
    return resolve(loaded, pieces=PIECES, world_size=1, accelerate_precision=None)


def text() -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, PIECES, (2, 13), generator=torch.Generator().manual_seed(1))
    return rows[:, :-1], rows[:, 1:].contiguous()


def engine_of(*overrides: str) -> TorchEngine:
    return TorchEngine(configured(*overrides), "single", SINGLE)
