"""Rules between the keys of `engine.*`, the number of processes and what compiles."""

from collections.abc import Iterator

from stablelm.config.schema import Config

SHARDED = ("fsdp2", "hsdp")
ZERO = ("zero1", "zero2", "zero3")


def problems(config: Config, world_size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A sentence and the keys to blame for each broken rule; `engine.kind` may still be `auto`."""
    yield from _kind(config, world_size)
    yield from _offload(config)
    yield from _zero(config)
    yield from _sharded(config)
    if config.engine.memory_budget < 1 and config.train.compile is not True:
        yield (
            f"engine.memory_budget={config.engine.memory_budget} is spent by torch.compile; "
            "set train.compile=true, or use engine.recompute=full",
            ("engine.memory_budget", "train.compile"),
        )


def _kind(config: Config, world_size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    kind, replicas = config.engine.kind, config.engine.replicas
    if kind == "single" and world_size > 1:
        yield (
            f"engine.kind=single cannot use the {world_size} processes that were started; use ddp, fsdp2 or auto",
            ("engine.kind",),
        )
    if replicas is not None and kind not in ("hsdp", "auto"):
        yield (
            f"engine.replicas={replicas} means nothing to engine.kind={kind}; leave it out or use engine.kind=hsdp",
            ("engine.replicas", "engine.kind"),
        )
    if kind == "hsdp" and not hsdp_sizes(world_size):
        yield (
            f"engine.kind=hsdp needs at least 2 copies of at least 2 shards, which {world_size} "
            f"process{'es' * (world_size > 1)} cannot make; start a multiple of 2 from 4 on, or use fsdp2",
            ("engine.kind",),
        )
    elif kind == "hsdp" and replicas is not None and replicas not in hsdp_sizes(world_size):
        fits = " or ".join(str(size) for size in hsdp_sizes(world_size))
        yield (
            f"engine.replicas={replicas} does not split {world_size} processes into copies of at least 2 shards; "
            f"use {fits}",
            ("engine.replicas",),
        )


def hsdp_sizes(world_size: int) -> list[int]:
    """The numbers of copies that leave at least two copies of at least two shards each."""
    return [n for n in range(2, world_size // 2 + 1) if world_size % n == 0]


def _offload(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    kind, offload = config.engine.kind, config.engine.offload
    if offload == "none" or kind == "auto":
        return
    allowed = {"zero3": ("optimizer", "parameters"), **dict.fromkeys(SHARDED, ("parameters",))}
    allowed |= dict.fromkeys(ZERO[:2], ("optimizer",))
    if offload not in allowed.get(kind, ()):
        fits = [other for other, kinds in allowed.items() if offload in kinds]
        more = f", or engine.offload={allowed[kind][0]}" if kind in allowed else ""
        yield (
            f"engine.offload={offload} is not possible under engine.kind={kind}; "
            f"use engine.kind={' or '.join(sorted(fits))}{more}",
            ("engine.offload", "engine.kind"),
        )


def _zero(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What DeepSpeed cannot do: its master weights are fp32 at most, and its ZeRO-3 hooks cannot be traced."""
    kind = config.engine.kind
    if kind in ZERO and config.train.precision == "fp64":
        yield (
            f"train.precision=fp64 is not possible under engine.kind={kind}, whose master weights are fp32; "
            "use fsdp2, hsdp, ddp or single",
            ("train.precision", "engine.kind"),
        )
    if kind == "zero3" and config.train.compile is True:
        yield (
            "train.compile=true is not possible under engine.kind=zero3, which gathers weights in hooks that "
            "cannot be compiled; use fsdp2, zero2 or train.compile=false",
            ("train.compile", "engine.kind"),
        )


def _sharded(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What only FSDP2 and HSDP do."""
    kind, engine = config.engine.kind, config.engine
    given = {"accumulate": "auto", "reshard_after_forward": "auto", "reduce_dtype": "fp32"}
    for name, default in given.items():
        value = getattr(engine, name)
        if value != default and kind not in (*SHARDED, "auto"):
            yield (
                f"engine.{name}={value} means nothing to engine.kind={kind}; leave it out or use fsdp2 or hsdp",
                (f"engine.{name}", "engine.kind"),
            )


def reduction(config: Config, accelerate_precision: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Sums in bf16 of what has more digits."""
    precision = config.train.precision or accelerate_precision or "fp32"
    if config.engine.reduce_dtype == "bf16" and precision != "bf16":
        yield (
            f"engine.reduce_dtype=bf16 would round the gradients of train.precision={precision}; leave it out, or use "
            "train.precision=bf16",
            ("engine.reduce_dtype", "train.precision"),
        )
    elif config.engine.reduce_dtype == "bf16" and config.engine.accumulate == "local":
        yield (
            "engine.accumulate=local would add up micro-batches in engine.reduce_dtype=bf16; use sharded or auto, "
            "which add up in fp32",
            ("engine.accumulate", "engine.reduce_dtype"),
        )


def float8(config: Config, accelerate_precision: str | None) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What `train.float8` contradicts."""
    asked, kind = config.train.float8, config.engine.kind
    precision = config.train.precision or accelerate_precision or "fp32"
    if asked != "none" and precision != "bf16":
        yield (
            f"train.float8={asked} takes the place of bf16 products, and train.precision={precision} has none; use "
            "train.precision=bf16, or leave train.float8 out",
            ("train.float8", "train.precision"),
        )
    if asked != "none" and kind in ZERO:
        yield (
            f"train.float8={asked} is not possible under engine.kind={kind}; use fsdp2, hsdp, ddp or single",
            ("train.float8", "engine.kind"),
        )


def compiles(config: Config, kind: str, *, device_compiles: bool) -> bool:
    """What `train.compile` comes to under an engine's kind; `device_compiles`: whether auto means yes."""
    if config.train.compile != "auto":
        return config.train.compile
    in_parts = config.engine.recompute == "selective" and config.model.axes.stream.grows
    return device_compiles and kind != "zero3" and not in_parts
