"""The range of each number on its own: what it must be, in words and as a test, and the keys it holds for."""

from collections.abc import Callable, Iterator
from typing import Any

from stablelm.config.keys import keys

_RANGES: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "at least 1",
        lambda v: v >= 1,
        "run.stop_after model.n_layers model.d_model model.n_heads model.kv_heads model.d_ff model.max_seq_len "
        "model.vocab_size data.seq_len data.lanes data.shuffle_block data.prefetch train.steps train.tokens "
        "train.global_batch_size train.micro_batch_size train.power_after train.float8_min_width checkpoint.keep "
        "checkpoint.keep_permanent_every evaluate.batches evaluate.micro_batch_size evaluate.sample_tokens "
        "evaluate.task_items engine.unit_bytes engine.replicas engine.prefetch data.max_document_bytes "
        "guards.skip_data faults.bad_batch faults.corrupt_save faults.full_disk",
    ),
    (
        "at least 0",
        lambda v: v >= 0,
        "run.seed data.workers data.retry_budget data.cache_bytes train.min_lr train.warmup_steps train.cooldown_steps "
        "train.weight_decay train.power_exponent train.grad_clip train.z_loss checkpoint.every observe.every "
        "observe.layers_every observe.sharpness_every evaluate.every engine.gc_every model.attention.logit_cap "
        "guards.max_rewinds guards.max_skips",
    ),
    (
        "above 0",
        lambda v: v > 0,
        "model.norm_eps model.norm_alpha model.attention.rope_base train.lr train.eps guards.threshold "
        "observe.hang_seconds observe.first_step_seconds engine.memory_limit",
    ),
    ("at least 2", lambda v: v >= 2, "guards.window"),
    ("0 to 1", lambda v: 0 <= v <= 1, "model.attention.low_rank model.embedding_gradient_scale engine.memory_budget"),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, "model.dropout train.ema"),
    ("two numbers at least 0 and below 1", lambda v: all(0 <= beta < 1 for beta in v), "train.betas"),
    ("below 2**63", lambda v: v < 2**63, "run.seed train.tokens"),
    ("a directory's name", lambda v: v.strip() != "", "run.dir checkpoint.dir data.cache"),
]


def ranges() -> Iterator[tuple[str, Callable[[Any], bool], str]]:
    """(what it must be, the test, the key) of each number: those here, and those that methods give their options."""
    for words, holds, names in _RANGES:
        yield from ((words, holds, name) for name in names.split())
    for key in keys().values():
        if key.range is not None:
            yield key.range.words, key.range.holds, key.name
