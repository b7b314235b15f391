"""Every method and axis value there is, and how a model's keys become them."""

import difflib
import sys
from functools import lru_cache
from operator import attrgetter
from typing import Any

from stablelm.errors import ConfigError
from stablelm.import_path import named
from stablelm.methods.activations import ACTIVATIONS
from stablelm.methods.admin import ADMIN
from stablelm.methods.alibi import Alibi
from stablelm.methods.attention_residuals import ATTENTION_RESIDUALS
from stablelm.methods.axes import Axes, M, Method, MethodOptions, Model, Value
from stablelm.methods.catformer import CATFORMER
from stablelm.methods.completep import COMPLETEP
from stablelm.methods.deepnorm import DEEPNORM
from stablelm.methods.deepscalelm import DEEPSCALELM_POST, DEEPSCALELM_PRE
from stablelm.methods.denseformer import DENSEFORMER
from stablelm.methods.dyt import DYT
from stablelm.methods.e_spa import E_SPA, E_SPA_SKIPS
from stablelm.methods.gated_attention import GATED_ATTENTION
from stablelm.methods.gpt2 import GPT2
from stablelm.methods.gtrxl import GTRXL
from stablelm.methods.hyper_connections import HYPER_CONNECTIONS
from stablelm.methods.keel import KEEL
from stablelm.methods.layer_drop import LAYER_DROP, STOCHASTIC_DEPTH
from stablelm.methods.layernorm_scaling import LAYERNORM_SCALING
from stablelm.methods.layerscale import LAYERSCALE
from stablelm.methods.looped import LOOPED
from stablelm.methods.magneto import MAGNETO
from stablelm.methods.mhc import MHC
from stablelm.methods.mix_ln import MIX_LN
from stablelm.methods.mlra import MLRA
from stablelm.methods.muddformer import MUDDFORMER
from stablelm.methods.ngpt import NGPT
from stablelm.methods.normformer import NORMFORMER
from stablelm.methods.norms import NORMS
from stablelm.methods.peri_ln import PERI_LN
from stablelm.methods.positions import POSITIONS
from stablelm.methods.post_ln import POST_LN
from stablelm.methods.pre_ln import PRE_LN
from stablelm.methods.qk_norm import QK_NORM
from stablelm.methods.resi_dual import RESI_DUAL
from stablelm.methods.rezero import REZERO
from stablelm.methods.scaled_embedding import EMBED_LN, SCALED_EMBED
from stablelm.methods.shaped_attention import SHAPED_ATTENTION
from stablelm.methods.sigma_reparam import SIGMA_REPARAM, SIGMA_REPARAM_NONORM
from stablelm.methods.simplified import SAS, SAS_P
from stablelm.methods.skipinit import SKIPINIT
from stablelm.methods.softmax_variants import ATTENTION_SINK, CLIPPED_SOFTMAX, SOFTMAX_ONE
from stablelm.methods.tfixup import TFIXUP
from stablelm.methods.u_spa import U_SPA
from stablelm.methods.value_residual import VALUE_RESIDUAL
from stablelm.methods.value_skipinit import VALUE_SKIPINIT
from stablelm.methods.wesar import WESAR
from stablelm.methods.with_sigma import CATFORMER_SIGMA, DEEPSCALELM_SIGMA, MAGNETO_SIGMA

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(PRE_LN, POST_LN, GPT2, DEEPSCALELM_PRE, DEEPSCALELM_POST, MAGNETO, SIGMA_REPARAM, SIGMA_REPARAM_NONORM),
        *(CATFORMER, DEEPNORM, PERI_LN, REZERO, TFIXUP, LAYERNORM_SCALING, COMPLETEP, QK_NORM, VALUE_RESIDUAL),
        *(HYPER_CONNECTIONS, MHC, MUDDFORMER, ATTENTION_RESIDUALS, GTRXL),
        *(DENSEFORMER, E_SPA, U_SPA, VALUE_SKIPINIT, E_SPA_SKIPS),
        *(MLRA, DYT, DEEPSCALELM_SIGMA, MAGNETO_SIGMA, CATFORMER_SIGMA),
        *(KEEL, MIX_LN, LAYERSCALE, SKIPINIT, ADMIN, NORMFORMER, RESI_DUAL),
        *(GATED_ATTENTION, SOFTMAX_ONE, ATTENTION_SINK, CLIPPED_SOFTMAX, SHAPED_ATTENTION, SAS, SAS_P),
        *(SCALED_EMBED, EMBED_LN, WESAR),
        *(NGPT, LOOPED, LAYER_DROP, STOCHASTIC_DEPTH),
    )
}
SHARED: tuple[Value, ...] = (*NORMS, *ACTIVATIONS, *POSITIONS, Alibi())
"""Axis values that belong to no single method."""
KEYS = {
    **{axis: axis for axis in ("stream", "placement", "norm", "init", "reparam", "activation")},
    **{axis: axis for axis in ("stack", "depth_drop", "gains")},
    **{axis: f"attention.{axis}" for axis in ("position", "shaping", "gate", "softmax")},
}
"""The keys, below `model.`, of the axes whose values are named."""
ASKED = ("value_mixing", "maps")
"""The axes of whose values each says itself whether the keys ask for it."""


def find(name: str) -> Method:
    """The method of that name, or at an import path `package.module:NAME`. Raises ConfigError."""
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    near = difflib.get_close_matches(name, METHODS, n=1)
    fix = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(METHODS)}."
    raise ConfigError(f"model.method={name} is not a known method: {fix}")


@lru_cache
def _imported(path: str) -> Method:
    try:
        found = named(path)
    except ConfigError as error:
        raise ConfigError(f"model.method={path}: {error}") from error
    if not isinstance(found, Method):
        raise ConfigError(
            f"model.method={path} is a {type(found).__name__}, not a method; name a stablelm.methods.axes.Method"
        )
    return found


def is_loaded(path: str) -> bool:
    """Whether an import path names a method of a module that the program has imported already: nothing is imported."""
    module, _, name = path.partition(":")
    return isinstance(getattr(sys.modules.get(module), name, None), Method)


@lru_cache
def options() -> dict[str, type[MethodOptions]]:
    """The options that methods have, by section below `model.`."""
    return {kind.SECTION: kind for method in METHODS.values() for kind in method.options}


@lru_cache
def values(axis: str, method: str | None = None) -> dict[str, Value]:
    """The values of an axis by name, those that the method of an import path introduces with them."""
    kind = Axes.__annotations__[axis]
    own = find(method).values if method is not None and method not in METHODS else ()
    everything = [value for known in METHODS.values() for value in known.values]
    return {value.name: value for value in (*everything, *SHARED, *own) if isinstance(value, kind)}


def apply_method(model: M) -> M:
    """Fills the axes that are None with the values of `model.method`; keys that are set stay.

    Raises ConfigError for an unknown method.
    """
    defaults = {**PRE_LN.defaults, **find(model.method).defaults}
    prefix = "attention."
    own = {key: value for key, value in defaults.items() if "." not in key and getattr(model, key) is None}
    inner = {key.removeprefix(prefix): value for key, value in defaults.items() if key.startswith(prefix)}
    inner = {key: value for key, value in inner.items() if getattr(model.attention, key) is None}
    return model.changed(**own, attention=model.attention.changed(**inner))


def axes(model: Model) -> Axes:
    """The values that a model's keys ask for; `apply_method` fills those that are None."""
    named: dict[str, Any] = {
        axis: values(axis, model.method)[str(attrgetter(key)(model))] for axis, key in KEYS.items()
    }
    named["activation"] = named["activation"].at(model)
    # Of a method's own value and a general one that ask the same key the method's counts; the plain one is the first.
    asked = {axis: _last_asked(values(axis, model.method), model) for axis in ASKED}
    found: dict[str, Any] = {**named, **asked}
    return Axes(**found)


def _last_asked(known: dict[str, Value], model: Model) -> Value:
    return next(value for value in reversed(known.values()) if value.asked(model))


def problems(model: Model) -> list[tuple[str, tuple[str, ...]]]:
    """What is wrong with a model whose axes are filled: sentences, each with the keys to blame."""
    refused = [refusal for value in model.axes.each() for refusal in value.refusals(model)]
    return [(f"{_shown(model, keys)}: {reason}", keys) for keys, reason in refused]


def export_obstacles(model: Model) -> list[str]:
    """Why no standard architecture computes the same as the model; none if one does."""
    return [reason for value in model.axes.each() if (reason := value.export_obstacle(model)) is not None]


def cache_obstacles(model: Model) -> list[str]:
    """Why the keys and values of earlier tokens cannot be kept while text is generated; none if they can."""
    return [reason for value in model.axes.each() if (reason := value.cache_obstacle(model)) is not None]


def _shown(model: Model, keys: tuple[str, ...]) -> str:
    return " with ".join(f"{key}={_value(model, key.split('.')[1:])}" for key in keys)


def _value(model: Model, parts: list[str]) -> object:
    kinds = options()
    found: object = model.option(kinds[parts[0]]) if parts[0] in kinds else getattr(model, parts[0])
    for part in parts[1:]:
        found = getattr(found, part)
    return found
