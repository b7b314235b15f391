"""GPT2LMHeadModel: layer norms in front, learned positions, one key and value head for each query head.

Its matrices are (d_in, d_out), and query, key and value are one. All maps and norms have biases, zero where ours have
none; without learned positions the table of positions is zero.
"""

from typing import Any

from stablelm.export.folding import Affine, Folded
from stablelm.export.formats.llama import Named
from stablelm.export.weights import constant, joined


def obstacles(folded: Folded) -> list[str]:
    """See `choice.Format`."""
    model, found = folded.model, list(folded.obstacles)
    axes = model.axes
    if axes.activation.gated:
        found.append(f"model.activation={axes.activation.name} has a gate (gelu and relu have none)")
    if axes.position.standard not in (None, "table", "causal"):
        found.append(f"model.attention.position={axes.position.name} (learned or none fits)")
    if axes.norm.standard not in (None, "layer"):
        found.append(f"model.norm={axes.norm.name} (layernorm fits)")
    if axes.placement.on_branch:
        found.append("it has norms on its branches (model.placement=pre has none)")
    if model.kv_heads != model.n_heads:
        found.append(f"model.kv_heads={model.kv_heads} for {model.n_heads} query heads (as many fit)")
    if model.attention.qk_norm:
        found.append("model.attention.qk_norm=true (false fits)")
    if model.attention.logit_cap:
        found.append(f"model.attention.logit_cap={model.attention.logit_cap:g} (0 is no cap)")
    return found


def config(folded: Folded) -> dict[str, Any]:
    """See `choice.Format`."""
    model = folded.model
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.max_seq_len,
        "n_embd": model.d_model,
        "n_layer": model.n_layers,
        "n_head": model.n_heads,
        "n_inner": model.d_ff,
        "activation_function": model.axes.activation.standard,
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": folded.tied,
    }


def tensors(folded: Folded) -> Named:
    """See `choice.Format`."""
    yield "transformer.wte.weight", folded.embedding()
    yield "transformer.wpe.weight", folded.positions()
    for index in range(folded.model.n_layers):
        layer, stem = folded.layer(index), f"transformer.h.{index}"
        first = [_biased(each) for each in (layer.query, layer.key, layer.value)]
        biases = [each.bias for each in first if each.bias is not None]
        yield from _norm(f"{stem}.ln_1", layer.norm_attention)
        yield from _map(f"{stem}.attn.c_attn", Affine(joined([each.weight for each in first]), joined(biases)))
        yield from _map(f"{stem}.attn.c_proj", layer.output)
        yield from _norm(f"{stem}.ln_2", layer.norm_feedforward)
        yield from _map(f"{stem}.mlp.c_fc", layer.up)
        yield from _map(f"{stem}.mlp.c_proj", layer.down)
    yield from _norm("transformer.ln_f", folded.final_norm())
    if not folded.tied:
        yield "lm_head.weight", folded.head()


def _biased(found: Affine) -> Affine:
    return Affine(found.weight, found.bias or constant(found.weight.shape[:1], 0.0))


def _map(stem: str, found: Affine) -> Named:
    found = _biased(found)
    assert found.bias is not None
    yield f"{stem}.weight", found.weight.transposed
    yield f"{stem}.bias", found.bias


def _norm(stem: str, found: Affine) -> Named:
    found = _biased(found)
    assert found.bias is not None
    yield f"{stem}.weight", found.weight
    yield f"{stem}.bias", found.bias
