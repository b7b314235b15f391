"""Ranks and engine kind from what started the process: accelerate launch, torchrun, srun or plain python."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from stablelm.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """Where this process stands among all ranks of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    launcher: str = "python"
    master_addr: str = "127.0.0.1"
    master_port: int = 0


@dataclass(frozen=True)
class AccelerateFlags:
    """What the flags or the config file of `accelerate launch` ask for; None where they say nothing."""

    engine: str | None = None
    precision: str | None = None


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
    """The engine and precision that accelerate's flags name; ConfigError for one we do not have."""
    if _says(environ, "ACCELERATE_USE_MEGATRON_LM"):
        raise ConfigError("accelerate's --use_megatron_lm is not supported; use --use_fsdp or no engine flag")
    if _says(environ, "ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate's --use_deepspeed asks for ZeRO, which this version does not have; use --use_fsdp instead"
        )
    precision = environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "false", "bf16"):
        raise ConfigError(f"accelerate's --mixed_precision {precision} is not supported; use bf16 or no")
    return AccelerateFlags(
        engine="fsdp2" if _says(environ, "ACCELERATE_USE_FSDP") else None,
        precision="bf16" if precision == "bf16" else None,
    )


def _says(environ: Mapping[str, str], name: str) -> bool:
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
    if kind == "single" and world_size > 1:
        raise ConfigError(
            f"engine.kind=single cannot use the {world_size} processes that were started; use ddp, fsdp2 or auto"
        )
    return kind
