"""The scales with which a plain pre-norm model's weights compute the same under another method.

Let the plain stream be y <- y + g(norm y), and ours x <- skip x + branch f(norm x) with x_0 = y_0. With c_s the product
of the first s skips the stream is x_s = c_s y_s at sub-layer s if f = (c_{s+1} / branch) g, which the output projection
takes.
A norm takes c_s out again where its eps is c_s^2 that of the plain model. What multiplies embeddings, norms, logits and
the head's input is divided out of the embedding, the norms' gains, the queries and the final norm.
"""

import operator
from functools import lru_cache
from itertools import accumulate

from stablelm.config.schema import ModelConfig
from stablelm.methods import catalogue
from stablelm.methods.sizes import d_head

NEGLIGIBLE = 1e-6
"""Relative: rounding of what should be equal."""


def obstacles(model: ModelConfig, *, norms_of_heads: bool) -> list[str]:
    """Why a plain model's weights do not fit a model whose axes are filled, none if they do.

    `norms_of_heads`: whether the plain model has norms on queries and keys.
    """
    found = [
        f"{axis} {value.name}: {reason}"
        for axis, value in vars(model.axes).items()
        if (reason := value.import_obstacle(model)) is not None
    ]
    if model.embedding_norm:
        found.append("embedding_norm: it has a norm on the embeddings, which the source does not have")
    if bool(model.attention.qk_norm) != norms_of_heads:
        found.append("qk_norm: it has norms on queries and keys, which the source does not have")
    if model.attention.logit_cap:
        found.append("logit_cap: it bounds the logits, which the source does not")
    if not found and not catalogue.problems(model) and not _norms_follow(model):
        found.append("norms have one eps at every depth, while the stream of the same function shrinks")
    return found


def fitting_methods(model: ModelConfig, *, norms_of_heads: bool) -> list[str]:
    """Names of the methods whose own values take the weights of such a model; `model`: the keys that it decides."""
    found = []
    for name in catalogue.METHODS:
        filled = for_import(model.changed(method=name))
        if not obstacles(filled, norms_of_heads=norms_of_heads) and not catalogue.problems(filled):
            found.append(name)
    return found


def for_import(model: ModelConfig) -> ModelConfig:
    """The model with its axes filled, and with the options under which weights fit exactly."""
    filled = catalogue.apply_method(model)
    return filled.axes.stream.for_import(filled)


def _norms_follow(model: ModelConfig) -> bool:
    stream = model.axes.stream
    return all(
        abs(stream.eps_scale(model, index) - scale**2) <= NEGLIGIBLE * scale**2
        for index, scale in enumerate(_stream_scales(model))
    )


@lru_cache(maxsize=4)
def _stream_scales(model: ModelConfig) -> list[float]:
    """c_s of each sub-layer and, last, of the end."""
    skips = [model.axes.stream.gains_in(model, index)[0] for index in range(2 * model.n_layers)]
    return [1.0, *accumulate(skips, operator.mul)]


def scale_of(name: str, model: ModelConfig) -> float:
    """What multiplies a plain model's parameter, by our name of it; the model has no `obstacles`."""
    axes, parts = model.axes, name.split(".")
    layer = int(parts[1]) if parts[0] == "layers" else 0
    sublayer, module = 2 * layer + ("feedforward" in parts), parts[-2]
    # A tied table is the head too, so the final norm undoes what the table takes.
    table = 1 / axes.init.embedding_scale(model)
    logits = d_head(model) ** -0.5 / axes.init.logit_scale(d_head(model))
    if module == "embedding":
        return table
    if module == "norm_final":
        return 1 / axes.init.head_scale(model) / (table if model.tie_embeddings else 1.0)
    if module == "norm_in":
        return 1 / axes.placement.input_scale(layer)
    if module == ("norm_query" if model.attention.qk_norm else "query"):
        return logits
    if module in ("output", "fc2"):
        return _stream_scales(model)[sublayer + 1] / axes.stream.gains_in(model, sublayer)[1]
    return 1.0
