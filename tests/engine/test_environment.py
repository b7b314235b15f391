"""Ranks and engine kinds from the variables that launchers set."""

import pytest

from stablelm.engine.environment import AccelerateFlags, accelerate_flags, detect, engine_kind, first_host
from stablelm.errors import ConfigError


def test_plain_python_is_one_process():
    launch = detect({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})  # a batch script's own shell
    assert (launch.rank, launch.world_size, launch.launcher) == (0, 1, "python")


def test_torchrun_and_accelerate():
    environ = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "7",
    }
    launch = detect(environ)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.launcher) == (3, 4, 1, "torchrun")
    assert detect({**environ, "ACCELERATE_MIXED_PRECISION": "no"}).launcher == "accelerate"


def test_srun():
    environ = {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "gpu[003-004]", "SLURM_JOB_ID": "17", "SLURM_STEP_ID": "1",
    }  # fmt: skip
    launch = detect(environ)
    assert (launch.rank, launch.world_size, launch.local_world_size) == (2, 4, 2)
    assert launch.master_addr == "gpu003"
    assert detect({**environ, "SLURM_JOB_ID": "18"}).master_port != launch.master_port


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node7", "node7"), ("gpu[003-007,9],login1", "gpu003"), ("a[1,3]-ib,b2", "a1-ib"), ("x1,x2", "x1")],
)
def test_first_host(nodelist: str, host: str):
    assert first_host(nodelist) == host


def test_auto_takes_accelerates_flags_else_the_world_size():
    fsdp = accelerate_flags({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"})
    assert fsdp == AccelerateFlags(engine="fsdp2", precision="bf16")
    assert engine_kind("auto", fsdp, 1) == "fsdp2"
    unsaid = accelerate_flags({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_MIXED_PRECISION": "no"})
    assert unsaid == AccelerateFlags()
    assert engine_kind("auto", unsaid, 1) == "single"
    assert engine_kind("auto", unsaid, 2) == "fsdp2"
    assert engine_kind("ddp", unsaid, 2) == "ddp"


@pytest.mark.parametrize(
    ("kind", "environ", "words"),
    [
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "engine.kind=ddp contradicts accelerate's flags, which ask for fsdp2"),
        ("auto", {"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed asks for ZeRO"),
        ("auto", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm is not supported"),
        ("auto", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16 is not supported; use bf16"),
        ("single", {}, "engine.kind=single cannot use the 2 processes"),
    ],
)
def test_contradictions_are_named(kind: str, environ: dict[str, str], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        engine_kind(kind, accelerate_flags(environ), 2)
