"""Catformer's shape: the growth of the stream that gives a residual model's parameters (torch-free).

Davis et al., Catformer, ICML 2021, compare models of equal size; how the widths are shared out is ours.
"""

import math
from dataclasses import replace
from functools import lru_cache

from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import default_d_ff
from stablelm.model.flops import parameter_counts

TOLERANCE = 0.01


@lru_cache(maxsize=64)
def solve_shape(config: ModelConfig) -> ModelConfig:
    """Fills `catformer.growth`, `catformer.d_attention` and `d_ff` where they are None.

    `config` has its axes and vocabulary filled. What is counted: all but the embeddings and the head, so the
    projection from the whole stream to d_model too. Among the shapes within 1 % of the residual twin, the one
    nearest to the wanted expansions; the nearest in parameters if there is none.
    """
    target = _body(_twin(config))
    best: tuple[float, ModelConfig] | None = None
    for growth in _growths(config):
        for d_attention in _attention_widths(config, growth):
            shape = _with_d_ff(config, growth, d_attention, target)
            if shape is None:
                continue
            error = abs(_body(shape) / target - 1)
            cost = _unlike(shape, config) if error <= TOLERANCE else 1e3 * (1 + error)
            if best is None or cost < best[0]:
                best = (cost, shape)
    assert best is not None, "growth 1 and the narrowest heads always give a shape"
    return best[1]


def parameter_error(config: ModelConfig) -> float:
    """Relative difference in parameters of a solved shape from its residual twin, embeddings and head left out."""
    return _body(config) / _body(_twin(config)) - 1


def _twin(config: ModelConfig) -> ModelConfig:
    assert config.activation is not None
    return replace(config, stream="residual", d_ff=default_d_ff(config.d_model, config.activation))


def _body(config: ModelConfig) -> int:
    counts = parameter_counts(config)
    return counts["total"] - counts["embedding"] - counts["head"]


def _growths(config: ModelConfig) -> range | list[int]:
    """Candidates around the solution of the equation without norms and rounding."""
    if config.catformer.growth is not None:
        return [config.catformer.growth]
    n, d, e_a, e_f = config.n_layers, config.d_model, *_expansions(config)
    matrices = 3 if config.activation == "swiglu" else 2
    a = (3 * e_a + (matrices - 1) * e_f) * n * n + (e_a + e_f) * n
    b = (3 * e_a + (matrices - 1) * e_f) * n * d + 2 * d
    guess = (-b + math.sqrt(b * b + 48 * a * n * d * d)) / (2 * a)
    return range(max(1, int(guess * 0.6)), max(4, math.ceil(guess * 1.3)) + 1)


def _expansions(config: ModelConfig) -> tuple[float, float]:
    return config.catformer.attention_expansion, config.catformer.feedforward_expansion


def _attention_widths(config: ModelConfig, growth: int) -> list[int]:
    """Widths near the wanted one that the heads divide, each head's even where rope halves it."""
    if config.catformer.d_attention is not None:
        return [config.catformer.d_attention]
    unit = config.n_heads * (2 if config.attention.position == "rope" else 1)
    wanted = config.catformer.attention_expansion * growth / unit
    return sorted({unit * max(1, round(wanted) + step) for step in (-1, 0, 1)})


def _with_d_ff(config: ModelConfig, growth: int, d_attention: int, target: int) -> ModelConfig | None:
    """The shape whose d_ff, unless it is given, comes nearest to the target; None if even 1 is too much."""
    shape = replace(config, catformer=replace(config.catformer, growth=growth, d_attention=d_attention))
    if config.d_ff is not None:
        return shape
    one, two = (_body(replace(shape, d_ff=d_ff)) for d_ff in (1, 2))
    d_ff = 1 + round((target - one) / (two - one))
    return replace(shape, d_ff=max(1, d_ff)) if d_ff >= 1 or growth == 1 else None


def _unlike(shape: ModelConfig, config: ModelConfig) -> float:
    """Distance of a shape's expansions from the wanted ones."""
    growth, d_attention, d_ff = shape.catformer.growth, shape.catformer.d_attention, shape.d_ff
    assert growth and d_attention and d_ff
    e_a, e_f = _expansions(config)
    return abs(math.log(d_attention / (e_a * growth))) + abs(math.log(d_ff / (e_f * growth)))
