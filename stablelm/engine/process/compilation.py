"""Which layers torch.compile compiles, and where `train.compile: auto` means yes."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from stablelm.config.engine_rules import compiles
from stablelm.config.schema import Config, ModelConfig
from stablelm.engine.process.environment import own_compile_folder
from stablelm.errors import ConfigError
from stablelm.model.sublayer import Layer, Sublayer
from stablelm.private_names import configure_compilation, recompile_limit_errors

OLDEST = (7, 0)
"""The compute capability from which Triton makes kernels."""


def settled(config: Config, kind: str, device: torch.device) -> Config:
    """`config` with what `train.compile` comes to under an engine's kind on that device, true or false."""
    answer: Any = compiles(config, kind, device_compiles=not obstacle(device))
    return replace(config, train=replace(config.train, compile=answer))


def obstacle(device: torch.device) -> str:
    """Why `train.compile: auto` means no on a device; '' where it means yes."""
    return lacking(device) if device.type == "cuda" else "auto compiles on GPUs alone"


def lacking(device: torch.device) -> str:
    """What torch.compile lacks on a device; '' where it has all that it needs."""
    if device.type != "cuda":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return "" if shutil.which(compiler) else f"CPUs need the C++ compiler {compiler!r}, which is not installed"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton needs a C compiler, and there is none"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return f"Triton makes no kernels for {torch.cuda.get_device_name(device)}"
    return ""


def check_compile(asked: bool | str, device: torch.device) -> None:
    """Raises ConfigError where `train.compile` is true and cannot be."""
    if asked is True and (reason := lacking(device)):
        raise ConfigError(f"train.compile=true: {reason}; install it, or use train.compile=false")


def compile_layers(layers: nn.ModuleList, config: ModelConfig, memory_budget: float) -> None:
    """Compiles each layer in place; all share one graph, so a second one means a shape that should not vary.

    On a concatenated stream, whose width grows, the bodies after the first maps: their shapes are fixed.
    """
    own_compile_folder()
    axes, limit = config.axes, None
    differ = axes.stream.layers_differ or axes.stream.eps_scale(config, 2) != axes.stream.eps_scale(config, 0)
    if axes.placement.by_depth or axes.placement.layers_differ or differ or axes.shaping.active:
        limit = 8 * config.n_layers  # torch's own limit of shapes and modes, for each layer
    torch.compiler.reset()  # it counts the graphs of all models together; those of others compile again when called
    configure_compilation(memory_budget=memory_budget, recompile_limit=limit)
    whole = [layer for layer in layers.modules() if isinstance(layer, Layer)]
    bodies = [layer.body for layer in layers.modules() if isinstance(layer, Sublayer)]
    for part in bodies if axes.stream.grows else whole:
        part.compile()


@contextmanager
def limit_explained(compiled: bool) -> Iterator[None]:
    """Says in one sentence that compiled layers got shapes of too many kinds. Raises ConfigError."""
    if not compiled:
        yield
        return
    try:
        yield
    except recompile_limit_errors() as error:
        raise ConfigError(
            "train.compile=true compiles each layer for a few shapes and modes, and this run has more (batch sizes, "
            "sequence lengths, frozen parameters); use train.compile=false"
        ) from error


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """Runs compiled layers as they were written, where there are any: shapes that change would compile again."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
