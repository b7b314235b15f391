"""Gemma2ForCausalLM: norms in front of and on each branch, and a cap on the logits of attention.

It multiplies the token table by sqrt(hidden_size) and keeps gains less 1, so both are taken off here. Attention reaches
over all positions in every layer, and the logits of the head have no cap.
"""

import math
from typing import Any

from stablelm.export.folding import Affine, Folded
from stablelm.export.formats import llama
from stablelm.export.weights import LazyTensor


def obstacles(folded: Folded) -> list[str]:
    """See `choice.Format`."""
    model, found = folded.model, llama.relatives_obstacles(folded)
    if not model.axes.placement.on_branch:
        found.append(f"model.placement={model.axes.placement.name} has no norms on its branches (peri has)")
    if model.attention.qk_norm:
        found.append("model.attention.qk_norm=true (false fits)")
    if model.bias:
        found.append("model.bias=true in its feed-forwards (false fits)")
    return found


def config(folded: Folded) -> dict[str, Any]:
    """See `choice.Format`."""
    model = folded.model
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": model.axes.activation.standard,
        "attention_bias": False,
        "query_pre_attn_scalar": folded.d_head,
        "attn_logit_softcapping": model.attention.logit_cap or None,
        "final_logit_softcapping": None,
        "sliding_window": model.max_seq_len,
        "layer_types": ["full_attention"] * model.n_layers,
        **llama.shared_config(folded),
    }


def tensors(folded: Folded) -> llama.Named:
    """See `choice.Format`."""
    normaliser = math.sqrt(folded.model.d_model)
    yield "model.embed_tokens.weight", folded.embedding().times(1 / normaliser)
    for index in range(folded.model.n_layers):
        layer, stem = folded.layer(index), f"model.layers.{index}"
        yield from llama.attention(layer, stem, biased=False)
        yield from llama.feedforward(layer, stem, biased=False)
        assert layer.after_attention is not None
        assert layer.after_feedforward is not None
        yield f"{stem}.input_layernorm.weight", _less_one(layer.norm_attention)
        yield f"{stem}.post_attention_layernorm.weight", _less_one(layer.after_attention)
        yield f"{stem}.pre_feedforward_layernorm.weight", _less_one(layer.norm_feedforward)
        yield f"{stem}.post_feedforward_layernorm.weight", _less_one(layer.after_feedforward)
    final = folded.final_norm().times(normaliser if folded.tied else 1.0)
    yield from llama.end(folded, _less_one(final))


def _less_one(norm: Affine) -> LazyTensor:
    return norm.weight.map(lambda gain: gain.sub_(1))
