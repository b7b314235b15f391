"""What `--format hf` writes beside our modelling file: its configuration and the tensors by its names.

The modelling file computes whatever the axis values answer with settings, so that every model of the catalogue has it;
spectral norms and the scales of norms by depth are multiplied into the tensors.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from stablelm.config.schema import ModelConfig
from stablelm.export.weights import LazyTensor, Weights
from stablelm.methods.axes import Value
from stablelm.methods.catalogue import KEYS
from stablelm.methods.sizes import d_head, logit_scale

MODELLING_FILE = Path(__file__).with_name("modeling_stablelm.py")
"""Copied beside the weights under the same name."""
MODEL_TYPE = "stablelm_decoder"
CLASSES = {
    "AutoConfig": "StablelmDecoderConfig",
    "AutoModel": "StablelmDecoderModel",
    "AutoModelForCausalLM": "StablelmDecoderForCausalLM",
}


class TrainedModel(Protocol):
    """A model and the weights of its checkpoint."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def weights(self) -> Weights: ...


def obstacles(source: TrainedModel) -> list[str]:
    """Why the modelling file does not compute the model; none for every model of the catalogue."""
    model = source.model
    axes = vars(model.axes).items()
    return [_obstacle(axis, value, model) for axis, value in axes if value.modelling(model) is None]


def _obstacle(axis: str, value: Value, model: ModelConfig) -> str:
    key = f"model.{KEYS[axis]}" if axis in KEYS else axis
    reason = value.export_obstacle(model)
    return f"{key}={value.name} is not among what our modelling file computes" + (f": {reason}" if reason else "")


def config(source: TrainedModel) -> dict[str, Any]:
    """The entries of config.json that say what the model computes, without token ids and dtype."""
    model, axes = source.model, source.model.axes
    skip, branch = axes.stream.gains(model)
    placement, attention = axes.placement, model.attention
    eps_scales = [axes.stream.eps_scale(model, index) for index in range(2 * model.n_layers + 1)]
    settings: dict[str, Any] = {
        "architectures": [CLASSES["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{MODELLING_FILE.stem}.{own}" for auto, own in CLASSES.items()},
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": d_head(model),
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_seq_len,
        "low_rank": axes.maps.rank(model),
        "bias": bool(model.bias),
        "dropout": model.dropout,
        "position_table": axes.position.adds_table,
        "logit_scale": logit_scale(model),
        "logit_cap": attention.logit_cap or None,
        "qk_norm": bool(attention.qk_norm),
        "document_end": attention.document_end,
        "norm_embedding": bool(model.embedding_norm),
        "norm_before_body": placement.before_body,
        "norm_before_output": placement.before_output,
        "norm_on_branch": placement.on_branch,
        "norm_after_write": placement.after_write,
        "norm_final": placement.final,
        "norm_bias": bool(model.bias) and axes.norm.has_bias,
        "norm_eps": model.norm_eps,
        "norm_eps_scales": None if set(eps_scales) == {1.0} else eps_scales,
        "skip_gain": skip,
        "branch_gain": branch,
        "embedding_scale": axes.init.embedding_scale(model),
        "head_scale": axes.init.head_scale(model),
        "gated": axes.activation.gated,
        "activation_scale": axes.activation.output_scale(model.n_layers),
        "tie_word_embeddings": bool(model.tie_embeddings),
    }
    for value in axes.each():
        settings |= value.modelling(model) or {}
    return settings


def tensors(source: TrainedModel) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the modelling file: our own names, below `model.` but for the head."""
    model, weights = source.model, source.weights
    for name in weights.shapes:
        stem, _, leaf = name.rpartition(".")
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        outside = "" if parts[0] == "head" else "model."
        if layer is None or "body" not in parts or parts[-2].startswith("norm_"):
            yield outside + name, weights.lazy(name).times(_norm_scale(model, layer, parts))
        elif leaf == "weight":
            yield outside + name, weights.matrix(stem, model, 2 * layer + (parts[2] == "feedforward"))
        elif leaf == "bias" or parts[-2] == "body":
            yield outside + name, weights.lazy(name)


def _norm_scale(model: ModelConfig, layer: int | None, parts: list[str]) -> float:
    """What multiplies a tensor: a norm before a body is scaled by depth, but for the slope inside it."""
    if layer is None or parts[-2] != "norm_in" or parts[-1] not in ("weight", "bias"):
        return 1.0
    return model.axes.placement.input_scale(layer)
