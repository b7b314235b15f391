"""Ranks, engine kind and settings from what started the process: accelerate launch, torchrun, srun or plain python."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stablelm.config.schema import Config
from stablelm.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """The place of this process among all ranks of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "python"
    master_addr: str = "127.0.0.1"
    master_port: int = 0


@dataclass(frozen=True)
class AccelerateFlags:
    """What the flags or the config file of `accelerate launch` ask for; None where they say nothing.

    `replicas` x `shards` processes make an hsdp mesh; `accumulation` counts micro-batches a step.
    """

    engine: str | None = None
    precision: str | None = None
    replicas: int | None = None
    shards: int | None = None
    offload: str | None = None
    grad_clip: float | None = None
    accumulation: int | None = None


def detect(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables; ConfigError where they contradict one another."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _from_torchrun(environ)
    # SLURM_STEP_NUM_TASKS is set by srun alone; a batch script's own shell has SLURM_NTASKS too.
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_srun(environ)
    return Launch()


def _from_torchrun(environ: Mapping[str, str]) -> Launch:
    launch = Launch(
        rank=int(environ["RANK"]),
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        world_size=int(environ["WORLD_SIZE"]),
        local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        launcher="accelerate" if "ACCELERATE_MIXED_PRECISION" in environ else "torchrun",
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environ.get("MASTER_PORT", "29500")),
    )
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(f"RANK={launch.rank} is not below WORLD_SIZE={launch.world_size}; let the launcher set both")
    return launch


def _from_srun(environ: Mapping[str, str]) -> Launch:
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    local = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    port = 20000 + (int(environ.get("SLURM_JOB_ID", "0")) * 64 + int(environ.get("SLURM_STEP_ID", "0"))) % 20000
    return Launch(
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ.get("SLURM_LOCALID", "0")),
        world_size=tasks,
        local_world_size=int(local.group()) if local else 1,
        launcher="srun",
        master_addr=environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        master_port=int(environ.get("MASTER_PORT", port)),
    )


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[003-007,9],login1` gives `gpu003`."""
    head = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,\[]*)", nodelist)
    prefix, ranges, suffix = head.groups() if head else (nodelist, None, "")
    if ranges is None:
        return prefix
    return prefix + re.split(r"[-,]", ranges)[0] + suffix


def accelerate_flags(environ: Mapping[str, str] = os.environ) -> AccelerateFlags:
    """The engine and settings that accelerate's flags name; ConfigError for what we do not have."""
    if is_set(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError(
            "accelerate's --use_megatron_lm is not supported; use --use_fsdp, --use_deepspeed or no engine flag"
        )
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "false", "bf16"):
        raise ConfigError(f"accelerate's --mixed_precision {precision} is not supported; use bf16 or no")
    flags = AccelerateFlags(precision="bf16" if precision == "bf16" else None)
    if is_set(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_flags(environ, flags)
    return _fsdp_flags(environ, flags) if is_set(environ, "ACCELERATE_USE_FSDP") else flags


def _fsdp_flags(environ: Mapping[str, str], flags: AccelerateFlags) -> AccelerateFlags:
    flags = replace(flags, engine="fsdp2", offload="parameters" if is_set(environ, "FSDP_OFFLOAD_PARAMS") else None)
    if is_set(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        sizes = {name: int(environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")) for name in _DIMENSIONS}
        for name in ("TP", "CP", "SP"):
            if sizes[name] > 1:
                raise ConfigError(
                    f"accelerate's parallelism_config_{name.lower()}_size={sizes[name]} is not supported; "
                    "use parallelism_config_dp_replicate_size and parallelism_config_dp_shard_size alone"
                )
        if sizes["DP_REPLICATE"] > 1:
            return replace(flags, engine="hsdp", replicas=sizes["DP_REPLICATE"], shards=sizes["DP_SHARD"])
    if environ.get("FSDP_SHARDING_STRATEGY", "").upper() in ("4", "HYBRID_SHARD"):
        return replace(flags, engine="hsdp")
    return flags


_DIMENSIONS = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")


def _deepspeed_flags(environ: Mapping[str, str], flags: AccelerateFlags) -> AccelerateFlags:
    """From accelerate's own settings, and those of the DeepSpeed file that they may name, which win."""
    asked: dict[str, Any] = {
        "stage": environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        "optimizer": environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"),
        "param": environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"),
        "clip": environ.get("ACCELERATE_GRADIENT_CLIPPING"),
        "accumulation": environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
    }
    path = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() not in ("", "none"):
        asked |= {key: value for key, value in _deepspeed_file(path).items() if value is not None}
        if asked.pop("bf16", False):
            flags = replace(flags, precision="bf16")
    asked = {key: None if str(value).lower() in ("none", "auto", "") else value for key, value in asked.items()}
    stage = _number(asked["stage"] if asked["stage"] is not None else 2, "zero_stage")
    if stage not in (1, 2, 3):
        raise ConfigError(f"accelerate's zero_stage {stage:g} is not supported; use 1, 2 or 3, or engine.kind=ddp")
    for key in ("optimizer", "param"):
        if asked[key] not in (None, "cpu"):
            raise ConfigError(f"accelerate's offload_{key}_device {asked[key]} is not supported; use cpu or none")
    return replace(
        flags,
        engine=f"zero{stage:g}",
        offload="parameters" if asked["param"] else "optimizer" if asked["optimizer"] else None,
        grad_clip=None if asked["clip"] is None else _number(asked["clip"], "gradient_clipping"),
        accumulation=None if asked["accumulation"] is None else int(_number(asked["accumulation"], "accumulation")),
    )


def _deepspeed_file(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
        zero = content.get("zero_optimization") or {}
        devices = {key: (zero.get(f"offload_{key}") or {}).get("device") for key in ("optimizer", "param")}
        halves = {key: (content.get(key) or {}).get("enabled") for key in ("fp16", "bf16")}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"cannot read deepspeed_config_file={path} ({error}); give a JSON file or none") from error
    if halves["fp16"] is True:
        raise ConfigError(f"fp16 of deepspeed_config_file={path} is not supported; use bf16 or neither")
    return devices | {
        "stage": zero.get("stage"),
        "clip": content.get("gradient_clipping"),
        "accumulation": content.get("gradient_accumulation_steps"),
        "bf16": True if halves["bf16"] is True else None,
    }


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"accelerate's {name} {value} is not a number") from None


def is_set(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable is set to a value that means yes."""
    return environ.get(name, "false").lower() not in ("", "0", "no", "false")


def engine_kind(kind: str, flags: AccelerateFlags, world_size: int) -> str:
    """Turns `engine.kind` into a concrete kind; ConfigError if it contradicts the launcher."""
    if kind == "auto":
        return flags.engine or ("single" if world_size == 1 else "fsdp2")
    if flags.engine and flags.engine != kind:
        raise ConfigError(
            f"engine.kind={kind} contradicts accelerate's flags, which ask for {flags.engine};"
            " drop the flag or set engine.kind=auto"
        )
    return kind


def apply_flags(config: Config, flags: AccelerateFlags, world_size: int) -> Config:
    """`config` with a concrete `engine.kind` and with what the launcher adds; ConfigError where they contradict."""
    engine = config.engine
    kind = engine_kind(engine.kind, flags, world_size)
    replicas, offload = engine.replicas, engine.offload
    if flags.replicas is not None:
        if flags.shards is not None and flags.replicas * flags.shards not in (world_size, -flags.replicas):
            raise ConfigError(
                f"accelerate's parallelism_config asks for {flags.replicas} x {flags.shards} processes, but "
                f"{world_size} were started; set num_processes={flags.replicas * flags.shards}"
            )
        replicas = _agreed("engine.replicas", replicas, None, "dp_replicate_size", flags.replicas)
    if flags.offload is not None:
        offload = _agreed("engine.offload", offload, "none", "offload settings", flags.offload)
    if flags.grad_clip is not None:
        _agreed("train.grad_clip", config.train.grad_clip, None, "gradient_clipping", flags.grad_clip)
    if flags.accumulation is not None and flags.accumulation > 1:
        sizes = [size for _, size in config.train.batch_sizes.stages]
        rows = config.train.micro_batch_size or max(sizes, default=0) // world_size
        for size in sizes:
            parts = -(-size // (world_size * max(1, rows)))
            _agreed("train.micro_batch_size", parts, None, "gradient_accumulation_steps", flags.accumulation)
    made: Any = replace(engine, kind=kind, replicas=replicas, offload=offload)
    return replace(config, engine=made)


def _agreed(key: str, ours: Any, unset: Any, name: str, theirs: Any) -> Any:
    if ours not in (unset, theirs):
        what = f"{key} (so {ours} micro-batches a step)" if key == "train.micro_batch_size" else f"{key}={ours}"
        raise ConfigError(
            f"{what} contradicts accelerate's {name}, which ask for {theirs}; drop one or make them equal"
        )
    return theirs


# Variable, values that ask for nothing or for what is done anyway, flag, and what to use in its place, if anything.
_ANY = (
    ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend", "train.compile=true"),
    ("ACCELERATE_DYNAMO_MODE", "default", "--dynamo_mode", ""),
    ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "false", "--dynamo_use_fullgraph", ""),
    ("ACCELERATE_DYNAMO_USE_DYNAMIC", "false", "--dynamo_use_dynamic", ""),
    ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "false", "--dynamo_use_regional_compilation", "train.compile=true"),
    ("ACCELERATE_CPU_AFFINITY", "0", "--enable_cpu_affinity", ""),
    ("ACCELERATE_DEBUG_MODE", "false", "--debug", ""),
)
_WITHOUT_FSDP = "engine.kind=zero2 or ddp without --use_fsdp"
_FSDP = (
    ("FSDP_SHARDING_STRATEGY", "1 full_shard 4 hybrid_shard", "--fsdp_sharding_strategy", _WITHOUT_FSDP),
    ("FSDP_RESHARD_AFTER_FORWARD", "true full_shard", "--fsdp_reshard_after_forward", _WITHOUT_FSDP),
    ("FSDP_MIN_NUM_PARAMS", "100000000", "--fsdp_min_num_params", "engine.unit_bytes"),
    ("FSDP_AUTO_WRAP_POLICY", "no_wrap transformer_based_wrap", "--fsdp_auto_wrap_policy", "engine.unit_bytes"),
    ("FSDP_TRANSFORMER_CLS_TO_WRAP", "", "--fsdp_transformer_layer_cls_to_wrap", "engine.unit_bytes"),
    ("FSDP_BACKWARD_PREFETCH", "backward_pre 1", "--fsdp_backward_prefetch", "engine.prefetch"),
    ("FSDP_FORWARD_PREFETCH", "false", "--fsdp_forward_prefetch", "engine.prefetch"),
    ("FSDP_STATE_DICT_TYPE", "sharded_state_dict", "--fsdp_state_dict_type", ""),
    ("FSDP_USE_ORIG_PARAMS", "true", "--fsdp_use_orig_params", ""),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "--fsdp_cpu_ram_efficient_loading", ""),
    ("FSDP_SYNC_MODULE_STATES", "true", "--fsdp_sync_module_states", ""),
    ("FSDP_ACTIVATION_CHECKPOINTING", "false", "--fsdp_activation_checkpointing", "engine.recompute=full"),
    ("FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", "false", "--fsdp_activation_checkpointing_offload", ""),
    ("FSDP_IGNORED_MODULES", "", "fsdp_ignored_modules", ""),
)
_DEEPSPEED = (
    ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false", "--zero3_save_16bit_model", ""),
    ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", "", "--deepspeed_moe_layer_cls_names", ""),
)
_PARALLELISM = tuple(
    (f"PARALLELISM_CONFIG_{name}_SIZE", "1", f"--parallelism_config_{name.lower()}_size", instead)
    for name, instead in (
        ("DP_REPLICATE", "engine.kind=hsdp and engine.replicas"),
        ("DP_SHARD", "engine.kind=fsdp2 or hsdp"),
        ("TP", ""),
        ("CP", ""),
        ("SP", ""),
    )
)
_READ_OF_FILE = ("zero_optimization", "gradient_clipping", "gradient_accumulation_steps", "bf16", "fp16")
_INSTEAD_OF_FILE = {
    "optimizer": "train.lr, betas, eps and weight_decay",
    "scheduler": "train.schedule",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "activation_checkpointing": "engine.recompute",
}


def unused_flags_warning(environ: Mapping[str, str] = os.environ) -> str:
    """One sentence that names every flag that was given and is not used; '' if there is none."""
    unused = [f"{flag} (use {instead})" if instead else flag for flag, instead in _unused(environ)]
    if not unused:
        return ""
    named = unused[0] if len(unused) == 1 else f"{', '.join(unused[:-1])} and {unused[-1]}"
    return f"warning: of accelerate's settings {named} {'is' if len(unused) == 1 else 'are'} not used"


def _unused(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    fsdp, deepspeed = is_set(environ, "ACCELERATE_USE_FSDP"), is_set(environ, "ACCELERATE_USE_DEEPSPEED")
    # Sizes of a mesh are read with FSDP alone.
    mesh = is_set(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") and not fsdp
    rows = _ANY + _FSDP * fsdp + _DEEPSPEED * deepspeed + _PARALLELISM * mesh
    for variable, unsaid, flag, instead in rows:
        value = environ.get(variable, "").lower()
        if value not in ("", "none", *unsaid.split()):
            yield flag, instead
    if deepspeed:
        yield from _of_file(environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"))


def _of_file(path: str) -> Iterator[tuple[str, str]]:
    """Settings of a DeepSpeed file, which is readable, that are not read."""
    if path.lower() in ("", "none"):
        return
    for name, value in json.loads(Path(path).read_text()).items():
        if name not in _READ_OF_FILE and value not in ("auto", None, False):
            yield f"{name} of deepspeed_config_file", _INSTEAD_OF_FILE.get(name, "")
