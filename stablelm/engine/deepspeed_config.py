"""Every setting of DeepSpeed that could change a run, written by us and read back: its defaults have changed before."""

from typing import Any

import torch

from stablelm.config.schema import Config
from stablelm.errors import ConfigError
from stablelm.private_names import settings_in_effect

# Elements up to which ZeRO-3 leaves a parameter whole on every rank: vectors, which are too small to gather (ours).
PERSISTENT = 2**14
UNLIMITED = 2**60


def settings(config: Config, stage: int, world_size: int, *, cuda: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a resolved `config`.

    The working weights stay fp32 under precision bf16 too: the model itself casts what it multiplies, so that gains,
    embeddings and sigma are not rounded. ZeRO-3 pays for it with gathers of 4 bytes an element in place of 2.
    Micro-batches are driven by the caller, so DeepSpeed accumulates nothing by itself.
    """
    rows = config.train.micro_batch_size or max(1, config.train.batch_sizes.largest // world_size)
    return {
        "train_batch_size": rows * world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "gradient_clipping": float(config.train.grad_clip),
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "communication_data_type": "fp32",
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": _zero(config, stage, cuda=cuda),
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on CPUs too, and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "disable_allgather": False,
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "flops_profiler": {"enabled": False},
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "steps_per_print": None,
        "disable_python_gc": False,
    }


def _zero(config: Config, stage: int, *, cuda: bool) -> dict[str, Any]:
    bucket = max(2, config.engine.unit_bytes // 4 * 2)  # elements, even: as many as a unit of FSDP2 has
    found: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": bucket,
        "overlap_comm": cuda,
        "offload_optimizer": _offload(config.engine.offload != "none", cuda=cuda),
        "offload_param": _offload(config.engine.offload == "parameters", cuda=cuda),
        "elastic_checkpoint": False,
        "load_from_fp32_weights": True,
    }
    if stage < 3:
        return found | {
            "use_multi_rank_bucket_allreduce": True,
            "allgather_partitions": True,
            "allgather_bucket_size": bucket,
            "compute_grad_norm": True,
            "ignore_unused_parameters": True,
            "round_robin_gradients": False,
            "parameter_alignment": False,
            "legacy_stage1": False,
        }
    return found | {
        "sub_group_size": UNLIMITED,
        "stage3_prefetch_bucket_size": config.engine.prefetch * bucket,
        "stage3_param_persistence_threshold": PERSISTENT,
        "stage3_model_persistence_threshold": UNLIMITED,
        # Nothing stays gathered beyond its use.
        "stage3_max_live_parameters": (1 + config.engine.prefetch) * bucket,
        "stage3_max_reuse_distance": 0,
        "stage3_gather_16bit_weights_on_model_save": False,
        "stage3_module_granularity_threshold": 0,
        "stage3_use_all_reduce_for_fetch_params": False,
        "stage3_allgather_sequential": False,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        # True replaces torch.nn.functional.linear for the whole process.
        "memory_efficient_linear": False,
        "override_module_apply": False,
        "log_trace_cache_warnings": False,
        "enable_sanity_checks": False,
    }


def _offload(wanted: bool, *, cuda: bool) -> dict[str, Any]:
    return {"device": "cpu" if wanted else "none", "pin_memory": cuda}


def check(engine: Any, wanted: dict[str, Any]) -> None:
    """Compares what a built DeepSpeed engine works with to the settings it was given; ConfigError names the key."""
    for key, value in _leaves(wanted):
        found = _found(engine, key)
        if found != value:
            raise ConfigError(
                f"DeepSpeed works with {key}={found} though {value} was asked for; "
                "this version of it is not supported: install the one that pyproject.toml names"
            )
    optimizer = engine.optimizer
    if hasattr(optimizer, "clip_grad") and optimizer.clip_grad != wanted["gradient_clipping"]:
        raise ConfigError(
            f"DeepSpeed clips at {optimizer.clip_grad} though gradient_clipping={wanted['gradient_clipping']} "
            "was asked for; install the version that pyproject.toml names"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


# Where DeepSpeed keeps what it read, if not under the key's own name.
_PLACES = {
    "fp16": "float16_config",
    "bf16": "bfloat16_config",
    "zero_optimization": "zero_config",
    "activation_checkpointing": "activation_checkpointing_config",
    "flops_profiler": "flops_profiler_config",
    "timers.throughput": "timers_config",
    "torch_autocast.enabled": "torch_autocast_enabled",
    "data_types.grad_accum_dtype": "grad_accum_dtype",
}


def _found(engine: Any, key: str) -> Any:
    for start, place in _PLACES.items():
        if key == start or key.startswith(start + "."):
            key = place + key[len(start) :]
    value = settings_in_effect(engine)
    for part in key.replace("stage3_", "").split("."):
        value = getattr(value, part)
    if isinstance(value, torch.dtype):
        return {torch.float32: "fp32"}.get(value, str(value))
    return getattr(value, "value", value)  # of an Enum
