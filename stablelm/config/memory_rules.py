"""Rules of the keys that trade time for memory: recomputation, updates in the backward pass, bytes of moments."""

import difflib
from collections.abc import Iterator

from stablelm.config.schema import Config, ModelConfig

MODES = ("none", "attention", "selective", "full", "auto")
EVERY = "every:"
LARGEST_BF16_BETA = 0.99
RESERVE = 5e9
"""Bytes of a GPU that tensors cannot use: driver context, NCCL buffers, workspaces, fragments (an assumption)."""
Problem = tuple[str, tuple[str, ...]]


def period(mode: str) -> int | None:
    """K where each K-th layer is recomputed whole: 1 for full; None for the other modes, or no mode at all."""
    if mode == "full":
        return 1
    number = mode.removeprefix(EVERY)
    return int(number) if mode.startswith(EVERY) and number.isdecimal() and len(number) < 10 else None


def problems(config: Config, world_size: int) -> Iterator[Problem]:
    """A sentence and the keys to blame for each broken rule."""
    yield from _recompute(config)
    yield from _moments(config)
    if config.engine.optimizer_in_backward:
        yield from _in_backward(config, world_size)


def _recompute(config: Config) -> Iterator[Problem]:
    mode, layers = config.engine.recompute, config.model.n_layers
    each = period(mode)
    if mode in MODES or (each is not None and 1 <= each <= layers):
        return
    if mode.startswith(EVERY):
        yield (
            f"engine.recompute={mode} must be {EVERY}K with an integer K from 1 to model.n_layers={layers}; "
            f"use {EVERY}{min(2, layers)}",
            ("engine.recompute", "model.n_layers"),
        )
        return
    near = difflib.get_close_matches(mode, (*MODES, EVERY), n=1)
    words = f"{', '.join(MODES[:-1])}, {EVERY}K or {MODES[-1]}"
    hint = f", did you mean {near[0].replace(EVERY, 'every:2')}?" if near else ""
    yield f"engine.recompute={mode} must be {words}{hint}", ("engine.recompute",)


def selective_problems(config: Config, model: ModelConfig) -> Iterator[Problem]:
    """`model` has its axes; where torch's selective checkpointing does not see the operations, or sees others."""
    if config.engine.recompute == "selective" and config.engine.kind == "zero3":
        yield (
            "engine.recompute=selective is not possible under engine.kind=zero3, which gathers weights among the "
            "operations that are recomputed; use engine.recompute=attention or engine.kind=fsdp2",
            ("engine.recompute", "engine.kind"),
        )
    if config.engine.recompute == "selective" and config.train.compile is True and model.axes.stream.grows:
        yield (
            f"engine.recompute=selective is not possible with train.compile=true and model.method={model.method}, of "
            "whose layers parts are compiled one by one; use engine.recompute=attention or train.compile=false",
            ("engine.recompute", "train.compile"),
        )


def _moments(config: Config) -> Iterator[Problem]:
    moments, kind, precision = config.train.moments, config.engine.kind, config.train.precision
    if moments == "fp32":
        return
    if precision == "fp64":
        yield (
            f"train.moments={moments} contradicts train.precision=fp64, which is for comparisons; use "
            "train.moments=fp32, which keeps moments in the parameters' precision",
            ("train.moments", "train.precision"),
        )
    if kind.startswith("zero") and moments == "int8":
        yield (
            f"train.moments=int8 is not possible under engine.kind={kind}, whose flat shards cut the blocks that share "
            "a scale; use train.moments=bf16, or engine.kind=fsdp2",
            ("train.moments", "engine.kind"),
        )
    if moments == "bf16" and max(config.train.betas) > LARGEST_BF16_BETA:
        yield (
            f"train.moments=bf16 rounds away the decay of a moment whose constant is above {LARGEST_BF16_BETA}, and "
            f"train.betas={list(config.train.betas)}; use a smaller constant, or train.moments=fp32 or int8",
            ("train.moments", "train.betas"),
        )


def _in_backward(config: Config, world_size: int) -> Iterator[Problem]:
    key, train = "engine.optimizer_in_backward", config.train
    rows = train.batch_sizes.largest // world_size
    found: list[tuple[str, str, str]] = []
    """The key that contradicts it, why, and the fix."""
    if config.engine.kind not in ("auto", "single") or world_size > 1:
        on = f" on {world_size} processes" if config.engine.kind == "auto" else ""
        words = f"engine.kind={config.engine.kind}{on}"
        found.append((words, "before it is reduced over ranks", "use one process with engine.kind=single"))
    if train.grad_clip > 0:
        words = f"train.grad_clip={train.grad_clip}"
        found.append((words, "before the norm of all gradients is known", "set train.grad_clip=0"))
    if train.micro_batch_size is not None and train.micro_batch_size < rows:
        words = f"train.micro_batch_size={train.micro_batch_size}"
        found.append((words, f"so that no step adds up {rows} sequences", f"set train.micro_batch_size={rows}"))
    if config.guards.spike == "skip":
        found.append(("guards.spike=skip", "before the norm of all gradients is known", "use guards.spike=rewind"))
    if config.guards.recheck:
        found.append(("guards.recheck=true", "so that no step can be repeated", "set guards.recheck=false"))
    if config.observe.metrics:
        words = "observe.metrics, which need all gradients before the update"
        found.append((words, "and frees that", "set observe.metrics=[]"))
    for words, why, fix in found:
        yield (
            f"{key}=true is not possible with {words}: it updates each parameter as soon as its gradient is there, "
            f"{why}; {fix}, or leave {key} out",
            (key, words.partition("=")[0].partition(",")[0]),
        )
