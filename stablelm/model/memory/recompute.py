"""Which activations a model keeps for its backward pass and which it computes again: `engine.recompute`.

Applied to a decoder from outside, before it is compiled or sharded. Losses and gradients are those of `none`: what is
computed again is computed by the same operations, and dropout draws the same masks.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from stablelm.config.memory_rules import period
from stablelm.model.sublayer import Layer
from stablelm.private_names import checkpoint_wrapper

_ATEN = torch.ops.aten
KEPT = {torch.ops.stablelm.causal_attention.default, torch.ops.stablelm.float8_matmul.default} | {
    getattr(_ATEN, name).default
    for name in (
        *("mm", "addmm"),
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
}
"""Operations whose results `selective` keeps: matmuls and attention, which cost what the others do not. Products of
batches of matrices are not among them: they are the logits of attention where no kernel is fused, of size seq^2."""


def apply(layers: nn.ModuleList, mode: str, *, dropout: float) -> None:
    """Changes the layers of a decoder in place by a concrete mode of `engine.recompute` (not auto).

    The state of the random number generator is kept, a copy a layer, only where there is `dropout`.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout > 0)
    for index, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        if mode == "attention":
            layer.attend = partial(again, layer.attend)
        elif mode == "selective":
            layer.compute = partial(again, layer.compute, context_fn=_keeping_matmuls)
        elif is_recomputed(mode, index):
            # Around the compiled layer, of which nothing is kept then.
            layers[index] = checkpoint_wrapper(layer, preserve_rng_state=dropout > 0)


def is_recomputed(mode: str, index: int) -> bool:
    """Whether a mode keeps nothing of that layer but its inputs."""
    each = period(mode)
    return each is not None and index % each == 0


def _keeping_matmuls() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
