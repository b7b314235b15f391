"""Named methods: points in the space of streams, placements, initialisations, ... (torch-free)."""

import difflib
from dataclasses import dataclass, field, replace
from typing import Any

from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError


@dataclass(frozen=True)
class Method:
    """A named point of the space.

    `defaults` maps keys of the model section, written as under `model.`, to the method's own values;
    what it leaves out is as in `pre_ln`.
    """

    name: str
    paper: str
    defaults: dict[str, Any] = field(default_factory=dict)


_BASE: dict[str, Any] = {
    "stream": "residual",
    "placement": "pre",
    "norm": "layernorm",
    "embedding_norm": False,
    "init": "xavier",
    "reparam": "none",
    "activation": "gelu",
    "bias": False,
    "tie_embeddings": False,
    "attention.position": "rope",
    "attention.qk_norm": False,
    "attention.logit_cap": 0.0,
    "attention.value_residual": False,
    "attention.low_rank": 0.0,
    "attention.shaping": "none",
}

_DEEPSCALE = {"stream": "scaled", "init": "deepscale", "activation": "relu"}
_POST_DEEPSCALE = {"placement": "post", "embedding_norm": True}
_MAGNETO = {"placement": "sub", "init": "magneto"}
_SIGMA = {"reparam": "sigma"}
_CATFORMER = {"stream": "concat", "init": "unit"}

_KEDIA = "Kedia et al., Transformers Get Stable, ICML 2024"
_WANG = "Wang et al., Magneto: A Foundation Transformer, ICML 2023"
_ZHAI = "Zhai et al., Stabilizing Transformer Training by Preventing Attention Entropy Collapse, ICML 2023"
_DAVIS = "Davis et al., Catformer: Designing Stable Transformers via Sensitivity Analysis, ICML 2021"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("pre_ln", "Xiong et al., On Layer Normalization in the Transformer Architecture, ICML 2020"),
        Method("post_ln", "Vaswani et al., Attention Is All You Need, NeurIPS 2017", {"placement": "post"}),
        Method(
            "gpt2",
            "Radford et al., Language Models are Unsupervised Multitask Learners, OpenAI 2019",
            {"init": "gpt2", "bias": True, "tie_embeddings": True, "attention.position": "learned"},
        ),
        Method("deepscalelm_pre", _KEDIA, _DEEPSCALE),
        Method("deepscalelm_post", _KEDIA, {**_DEEPSCALE, **_POST_DEEPSCALE}),
        Method("magneto", _WANG, _MAGNETO),
        Method("sigma_reparam", _ZHAI, _SIGMA),
        Method("sigma_reparam_nonorm", _ZHAI, {**_SIGMA, "placement": "none", "init": "gpt2"}),
        Method("catformer", _DAVIS, _CATFORMER),
        Method(
            "deepnorm",
            "Wang et al., DeepNet: Scaling Transformers to 1,000 Layers, 2022",
            {"stream": "deepnorm", "placement": "post", "init": "deepnet"},
        ),
        Method(
            "peri_ln",
            "Kim et al., Peri-LN: Revisiting Normalization Layer in the Transformer Architecture, ICML 2025",
            {"placement": "peri", "embedding_norm": True, "init": "fan_in"},
        ),
        Method(
            "rezero",
            "Bachlechner et al., ReZero is All You Need: Fast Convergence at Large Depth, UAI 2021",
            {"stream": "rezero", "placement": "none"},
        ),
        Method(
            "tfixup",
            "Huang et al., Improving Transformer Optimization Through Better Initialization, ICML 2020",
            {"placement": "none", "init": "tfixup", "activation": "relu"},
        ),
        Method(
            "layernorm_scaling",
            "Sun et al., The Curse of Depth in Large Language Models, 2025",
            {"placement": "pre_scaled", "norm": "rmsnorm", "init": "fan_in"},
        ),
        Method(
            "completep",
            "Dey et al., Don't be lazy: CompleteP enables compute-efficient deep transformers, 2025",
            {"stream": "completep", "init": "completep"},
        ),
        Method(
            "qk_norm",
            "Wortsman et al., Small-scale proxies for large-scale Transformer training instabilities, ICLR 2024",
            {"attention.qk_norm": True},
        ),
        Method(
            "value_residual",
            "Zhou et al., Value Residual Learning, ACL 2025",
            {"attention.value_residual": True},
        ),
        Method(
            "denseformer",
            "Pagliardini et al., DenseFormer: Enhancing Information Flow via Depth Weighted Averaging, NeurIPS 2024",
            {"stream": "dense", "init": "gpt2"},
        ),
        Method(
            "e_spa",
            "He et al., Deep Transformers without Shortcuts, ICLR 2023",
            {
                "stream": "skipless",
                "placement": "none",
                "init": "orthogonal",
                "activation": "tailored",
                "attention.shaping": "espa",
                "attention.position": "none",
            },
        ),
        Method(
            "mlra",
            "Chung et al., Stable Language Model Pre-training by Reducing Embedding Variability, EMNLP 2024",
            {"attention.low_rank": 0.5, "init": "gpt2"},
        ),
        Method("deepscalelm_sigma", f"{_KEDIA}; {_ZHAI}", {**_DEEPSCALE, **_SIGMA}),
        Method("magneto_sigma", f"{_WANG}; {_ZHAI}", {**_MAGNETO, **_SIGMA}),
        Method("catformer_sigma", f"{_DAVIS}; {_ZHAI}", {**_CATFORMER, **_SIGMA}),
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
    defaults = _BASE | method.defaults
    prefix = "attention."
    own = {key: value for key, value in defaults.items() if "." not in key and getattr(model, key) is None}
    inner = {key.removeprefix(prefix): value for key, value in defaults.items() if key.startswith(prefix)}
    inner = {key: value for key, value in inner.items() if getattr(model.attention, key) is None}
    return replace(model, **own, attention=replace(model.attention, **inner))


def default_d_ff(d_model: int, activation: str) -> int:
    """Feed-forward width: 4 d_model; for swiglu 8/3 d_model (equal parameters), rounded up to a multiple of 64."""
    if activation == "swiglu":
        return -(-8 * d_model // (3 * 64)) * 64
    return 4 * d_model
