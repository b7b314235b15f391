"""Flags of `accelerate launch` that nothing here reads, each with the key that does what it asks for."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from stablelm.engine.launch_environment import says

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


def warning(environ: Mapping[str, str] = os.environ) -> str:
    """One sentence that names every flag that was given and is not used; '' if there is none."""
    unused = [f"{flag} (use {instead})" if instead else flag for flag, instead in _unused(environ)]
    if not unused:
        return ""
    named = unused[0] if len(unused) == 1 else f"{', '.join(unused[:-1])} and {unused[-1]}"
    return f"warning: of accelerate's settings {named} {'is' if len(unused) == 1 else 'are'} not used"


def _unused(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    fsdp, deepspeed = says(environ, "ACCELERATE_USE_FSDP"), says(environ, "ACCELERATE_USE_DEEPSPEED")
    # Sizes of a mesh are read with FSDP alone.
    mesh = says(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") and not fsdp
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
