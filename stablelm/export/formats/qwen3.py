"""Qwen3ForCausalLM: the llama architecture with norms on each head's queries and keys."""

from typing import Any

from stablelm.export.folding import Folded
from stablelm.export.formats import llama


def obstacles(folded: Folded) -> list[str]:
    """See `choice.Format`."""
    model, found = folded.model, llama.relatives_obstacles(folded)
    if model.axes.placement.on_branch:
        found.append("it has norms on its branches (model.placement=pre has none)")
    if model.attention.logit_cap:
        found.append(f"model.attention.logit_cap={model.attention.logit_cap:g} (0 is no cap)")
    if not model.attention.qk_norm:
        found.append("model.attention.qk_norm=false (the architecture llama has none)")
    if model.bias:
        found.append("model.bias=true in its feed-forwards (false fits)")
    return found


def config(folded: Folded) -> dict[str, Any]:
    """See `choice.Format`."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": folded.model.axes.activation.standard,
        "attention_bias": False,
        "use_sliding_window": False,
        **llama.shared_config(folded),
    }


def tensors(folded: Folded) -> llama.Named:
    """See `choice.Format`."""
    yield from llama.tensors(folded)
    for index in range(folded.model.n_layers):
        layer, stem = folded.layer(index), f"model.layers.{index}.self_attn"
        assert layer.norm_query is not None
        assert layer.norm_key is not None
        yield f"{stem}.q_norm.weight", layer.norm_query
        yield f"{stem}.k_norm.weight", layer.norm_key
