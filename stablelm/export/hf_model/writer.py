"""What `--format hf` writes beside our modelling file: its configuration and the tensors by its names.

The modelling file computes whatever the axis values answer with settings, so that every model of the catalogue has it;
spectral norms and the scales of norms by depth are multiplied into the tensors.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.export.weights import LazyTensor, Weights, unrolled
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
    sublayers = range(2 * model.n_layers)
    gains = [axes.stream.gains_in(model, index) for index in sublayers]
    places, attention = [axes.placement.at(model, index) for index in sublayers], model.attention
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
        "norm_before_body": _common(at.before_body for at in places),
        "norm_before_output": _common(at.before_output for at in places),
        "norm_on_branch": _common(at.on_branch for at in places),
        "norm_after_write": _common(at.after_write for at in places),
        "norm_final": axes.placement.final,
        "norm_bias": bool(model.bias) and axes.norm.has_bias,
        "norm_eps": model.norm_eps,
        "norm_eps_scales": None if set(eps_scales) == {1.0} else eps_scales,
        "skip_gain": _common(skip for skip, _ in gains),
        "branch_gain": _common(branch for _, branch in gains),
        "embedding_scale": axes.init.embedding_scale(model),
        "head_scale": axes.init.head_scale(model),
        "gated": axes.activation.gated,
        "activation_scale": axes.activation.output_scale(),
        "tie_word_embeddings": bool(model.tie_embeddings),
    }
    for value in axes.each():
        settings |= value.modelling(model) or {}
    return settings


def _common(values: Iterable[Any]) -> Any:
    """The value that all sub-layers have, else a list."""
    each = list(values)
    return each[0] if len(set(each)) == 1 else each


def tensors(source: TrainedModel) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the modelling file: our own names, below `model.` but for the head."""
    model, weights = unrolled(source.model, source.weights)
    of_head = {f"head.{added.name}" for added in model.axes.gains.in_head(model)}
    for name in weights.shapes:
        if name in of_head:
            continue  # in the matrix
        if name == "head.weight":
            yield name, _output_matrix(source)
            continue
        stem, _, leaf = name.rpartition(".")
        parts = name.split(".")
        layer = int(parts[1]) if parts[0] == "layers" else None
        inside = layer is not None and "body" in parts and not parts[-2].startswith("norm_")
        if layer is None or not inside or parts[-2] == "body":
            yield f"model.{name}", weights.lazy(name).times(_norm_scale(model, layer, parts))
        elif leaf == "weight":
            yield f"model.{name}", weights.matrix(stem, model, 2 * layer + (parts[2] == "feedforward"))
        elif leaf == "bias":
            yield f"model.{name}", weights.lazy(name)


def _output_matrix(source: TrainedModel) -> LazyTensor:
    """The head's, with its learned factors."""
    model, weights = source.model, source.weights
    gains = model.axes.gains.at(model)
    names = [added.name for added in gains.in_head(model)]
    added = {name: weights.lazy(f"head.{name}") for name in names}

    def whole(weight: Tensor) -> Tensor:
        return gains.output_matrix(weight, {name: each.values() for name, each in added.items()})

    return weights.lazy("head.weight").map(whole)


def _norm_scale(model: ModelConfig, layer: int | None, parts: list[str]) -> float:
    """What multiplies a tensor: a norm before a body is scaled by depth, but for the slope inside it."""
    if layer is None or not re.fullmatch(r"norm_in(_\d+)?", parts[-2]) or parts[-1] not in ("weight", "bias"):
        return 1.0
    return model.axes.placement.input_scale(layer)
