"""Engines and steps at a size that suits the device."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, StepResult, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.train.step import train_step

LR = 1e-3


class Size(NamedTuple):
    """Layers, width, sequences, tokens of each, vocabulary."""

    n_layers: int
    d_model: int
    batch: int
    seq_len: int
    vocab_size: int


SMALL, TINY = Size(4, 256, 4, 256, 1024), Size(4, 64, 2, 32, 128)
DEEP = Size(24, 1024, 8, 1024, 32_000)


def small(device: torch.device) -> Size:
    return TINY if device.type == "cpu" else SMALL


def sizes(size: Size) -> list[str]:
    """Keys of the configuration, with heads of 64 features."""
    return [
        *(f"model.n_layers={size.n_layers}", f"model.d_model={size.d_model}", f"data.seq_len={size.seq_len}"),
        *(f"model.n_heads={size.d_model // 64}", f"train.global_batch_size={size.batch}", "train.steps=10"),
    ]


def configure(size: Size, *overrides: str, document_end: int | None = None) -> Config:
    """Resolved; `document_end`: the token after which attention begins anew."""
    loaded = load([], [*sizes(size), *overrides]).config
    config = resolve(loaded, pieces=size.vocab_size, world_size=1, accelerate_precision=None)
    attention = replace(config.model.attention, document_end=document_end)
    return replace(config, model=replace(config.model, attention=attention))


def alone(device: torch.device) -> Ranks:
    return Ranks(0, 1, device, None, None)


def engine_of(config: Config, device: torch.device) -> Engine:
    """In one process, its weights seeded by name: the same on every device."""
    torch.manual_seed(0)
    return build_engine(config, "single", alone(device))


def text_of(size: Size) -> tuple[Tensor, Tensor]:
    """Tokens and targets (batch, seq) in host memory, pinned where there is a GPU, as a run's batches are."""
    draw = torch.Generator().manual_seed(1)
    text = torch.randint(size.vocab_size, (size.batch, size.seq_len + 1), generator=draw)
    both = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return (both[0].pin_memory(), both[1].pin_memory()) if torch.cuda.is_available() else both


def step(engine: Engine, ranks: Ranks, text: tuple[Tensor, Tensor], number: int = 1, micro: int = 0) -> StepResult:
    return train_step(engine, ranks, *text, step=number, lr=LR, seed=0, micro=micro or text[0].shape[0])


def mean_loss(result: StepResult) -> float:
    return float(result.cross_entropy / result.valid)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, of the wanted tensor's norm."""
    wanted = wanted.double().cpu()
    return float((found.double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-12))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
