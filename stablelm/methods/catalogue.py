"""Named methods: points in the space of streams, norm placements and initialisations (torch-free)."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A named point of the space.

    `defaults` maps keys of the model section, written as under `model.`, to the method's own values.
    """

    name: str
    paper: str
    defaults: dict[str, Any] = field(default_factory=dict)


_PRE_LN = {
    "stream": "residual",
    "placement": "pre",
    "norm": "layernorm",
    "init": "xavier",
    "activation": "gelu",
    "bias": False,
    "tie_embeddings": False,
    "attention.position": "rope",
}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("pre_ln", "Xiong et al., On Layer Normalization in the Transformer Architecture, ICML 2020", _PRE_LN),
        Method("post_ln", "Vaswani et al., Attention Is All You Need, NeurIPS 2017", {**_PRE_LN, "placement": "post"}),
        Method(
            "gpt2",
            "Radford et al., Language Models are Unsupervised Multitask Learners, OpenAI 2019",
            {**_PRE_LN, "init": "gpt2", "bias": True, "tie_embeddings": True, "attention.position": "learned"},
        ),
    )
}


def apply_method(model: ModelConfig) -> ModelConfig:
    """Fills the axes that are None with the values of `model.method`; keys that are set stay.

    Raises ConfigError for an unknown method.
    """
    method = METHODS.get(model.method)
    if method is None:
        near = difflib.get_close_matches(model.method, METHODS, n=1)
        mend = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}."
        raise ConfigError(f"model.method={model.method} is not a known method: {mend}")
    own = {key: value for key, value in method.defaults.items() if "." not in key and getattr(model, key) is None}
    position = model.attention.position or method.defaults["attention.position"]
    return replace(model, **own, attention=replace(model.attention, position=position))


def default_d_ff(d_model: int, activation: str) -> int:
    """Feed-forward width: 4 d_model; for swiglu 8/3 d_model (equal parameters), rounded up to a multiple of 64."""
    if activation == "swiglu":
        return -(-8 * d_model // (3 * 64)) * 64
    return 4 * d_model
