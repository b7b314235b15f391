"""LlamaForCausalLM: root-mean-square norms in front, a gated feed-forward, rotary positions, grouped queries.

`qwen3` and `gemma2` share what is here.
"""

from collections.abc import Iterator
from typing import Any

from stablelm.export.folding import Affine, Folded, FoldedLayer
from stablelm.export.weights import LazyTensor, constant

Named = Iterator[tuple[str, LazyTensor]]


def obstacles(folded: Folded) -> list[str]:
    """See `choice.Format`."""
    found = relatives_obstacles(folded)
    if folded.model.axes.placement.on_branch:
        found.append("it has norms on its branches (model.placement=pre has none)")
    if folded.model.attention.logit_cap:
        found.append(f"model.attention.logit_cap={folded.model.attention.logit_cap:g} (0 is no cap)")
    if folded.model.attention.qk_norm:
        found.append("model.attention.qk_norm=true (the architecture qwen3 has it)")
    return found


def relatives_obstacles(folded: Folded) -> list[str]:
    """What neither this architecture nor its relatives compute."""
    model, found = folded.model, list(folded.obstacles)
    axes = model.axes
    if not axes.activation.gated:
        found.append(f"model.activation={axes.activation.name} has no gate (swiglu has)")
    if axes.position.standard not in (None, "rotary"):
        found.append(f"model.attention.position={axes.position.name} (rope fits)")
    if axes.norm.standard == "layer":
        if axes.placement.on_branch:
            found.append(f"model.norm={axes.norm.name} on the branches (rmsnorm fits)")
        if model.bias and axes.norm.has_bias:
            found.append("the bias of the norm in front of the head (model.bias=false or model.norm=rmsnorm)")
    return found


def config(folded: Folded) -> dict[str, Any]:
    """See `choice.Format`."""
    biased = has_biases(folded)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": folded.model.axes.activation.standard,
        "attention_bias": biased,
        "mlp_bias": biased,
        **shared_config(folded),
    }


def shared_config(folded: Folded) -> dict[str, Any]:
    """The entries of config.json that this architecture has in common with its relatives."""
    model = folded.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": folded.d_head,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.attention.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.attention.rope_base},
        "attention_dropout": 0.0,
        "tie_word_embeddings": folded.with_rms_norms.tied,
    }


def has_biases(folded: Folded) -> bool:
    """Whether the maps have biases."""
    return bool(folded.model.bias)


def tensors(folded: Folded) -> Named:
    """See `choice.Format`."""
    plain = folded.with_rms_norms
    yield "model.embed_tokens.weight", plain.embedding()
    for index in range(plain.model.n_layers):
        layer, stem = plain.layer(index), f"model.layers.{index}"
        yield from attention(layer, stem, biased=has_biases(folded))
        yield from feedforward(layer, stem, biased=has_biases(folded))
        yield f"{stem}.input_layernorm.weight", layer.norm_attention.weight
        yield f"{stem}.post_attention_layernorm.weight", layer.norm_feedforward.weight
    yield from end(plain, plain.final_norm().weight)


def attention(layer: FoldedLayer, stem: str, *, biased: bool) -> Named:
    """The maps of an attention sub-layer."""
    for name, each in (("q", layer.query), ("k", layer.key), ("v", layer.value), ("o", layer.output)):
        yield from linear(f"{stem}.self_attn.{name}_proj", each, biased=biased)


def feedforward(layer: FoldedLayer, stem: str, *, biased: bool) -> Named:
    """The maps of a gated feed-forward sub-layer."""
    assert layer.gate is not None
    for name, each in (("gate", layer.gate), ("up", layer.up), ("down", layer.down)):
        yield from linear(f"{stem}.mlp.{name}_proj", each, biased=biased)


def linear(stem: str, found: Affine, *, biased: bool) -> Named:
    """A map, with a bias if the architecture's have one."""
    yield f"{stem}.weight", found.weight
    if biased:
        yield f"{stem}.bias", found.bias or constant(found.weight.shape[:1], 0.0)


def end(folded: Folded, gain: LazyTensor) -> Named:
    """The norm in front of the head and, if it is not the token table, the head."""
    yield "model.norm.weight", gain
    if not folded.tied:
        yield "lm_head.weight", folded.head()
