"""Ranks and engine kinds from the variables that launchers set."""

import json
from pathlib import Path

import pytest

from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.engine.launch_environment import (
    AccelerateFlags,
    accelerate_flags,
    apply_flags,
    detect,
    engine_kind,
    first_host,
)
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


ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
}
HSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def test_deepspeed_and_hybrid_settings_are_read():
    assert accelerate_flags(ZERO3) == AccelerateFlags("zero3", "bf16", None, None, "optimizer", 1.0, 2)
    assert accelerate_flags(HSDP) == AccelerateFlags("hsdp", None, 2, 4)
    assert accelerate_flags({**HSDP, "FSDP_OFFLOAD_PARAMS": "true"}).offload == "parameters"
    assert accelerate_flags({**HSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "1"}).engine == "fsdp2"
    hybrid = {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}
    assert accelerate_flags(hybrid) == AccelerateFlags("hsdp")


def test_a_deepspeed_file_is_read(tmp_path: Path):
    path = tmp_path / "zero.json"
    content = {
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}},
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
    }
    path.write_text(json.dumps(content))
    environ = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert accelerate_flags(environ) == AccelerateFlags("zero1", "bf16")
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}, "fp16": {"enabled": True}}))
    with pytest.raises(ConfigError, match="fp16 of deepspeed_config_file="):
        accelerate_flags(environ)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot read deepspeed_config_file="):
        accelerate_flags(environ)


def test_what_the_launcher_says_goes_into_the_configuration():
    made = apply_flags(Config(), accelerate_flags({**ZERO3, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}), 2)
    assert (made.engine.kind, made.engine.offload) == ("zero3", "optimizer")
    made = apply_flags(Config(), accelerate_flags(HSDP), 8)
    assert (made.engine.kind, made.engine.replicas) == ("hsdp", 2)
    assert apply_flags(Config(), AccelerateFlags(), 1).engine.kind == "single"


@pytest.mark.parametrize(
    ("overrides", "environ", "world_size", "words"),
    [
        (["engine.offload=parameters"], ZERO3, 2, "engine.offload=parameters contradicts .* ask for optimizer"),
        (["train.grad_clip=0.5"], ZERO3, 2, "train.grad_clip=0.5 contradicts accelerate's gradient_clipping"),
        (["train.micro_batch_size=1", "train.global_batch_size=8"], ZERO3, 2, "so 4 micro-batches a step"),
        (["engine.kind=hsdp", "engine.replicas=4"], HSDP, 8, "engine.replicas=4 contradicts .* ask for 2"),
        ([], HSDP, 4, "asks for 2 x 4 processes, but 4 were started; set num_processes=8"),
    ],
)
def test_settings_of_both_sides_must_agree(overrides: list[str], environ: dict[str, str], world_size: int, words: str):
    with pytest.raises(ConfigError, match=words):
        apply_flags(load([], overrides).config, accelerate_flags(environ), world_size)


@pytest.mark.parametrize(
    ("kind", "environ", "words"),
    [
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "engine.kind=ddp contradicts accelerate's flags, which ask for fsdp2"),
        ("fsdp2", {"ACCELERATE_USE_DEEPSPEED": "true"}, "engine.kind=fsdp2 contradicts accelerate's flags, .* zero2"),
        ("auto", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "zero_stage 0 is not"),
        (
            "auto",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"},
            "offload_param_device nvme is not supported; use cpu",
        ),
        (
            "auto",
            {**HSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism_config_tp_size=2 is not supported",
        ),
        ("auto", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm is not supported"),
        ("auto", {"ACCELERATE_MIXED_PRECISION": "fp16"}, "--mixed_precision fp16 is not supported; use bf16"),
    ],
)
def test_contradictions_are_named(kind: str, environ: dict[str, str], words: str):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        engine_kind(kind, accelerate_flags(environ), 2)
