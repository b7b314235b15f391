"""Every reason for which a combination of axis values is refused, found by trying pairs of changes to every method."""

import itertools
from functools import lru_cache

from stablelm.config.schema import ModelConfig
from stablelm.methods import catalogue
from stablelm.methods.axes import Refusal
from stablelm.methods.sigma_reparam import SigmaOptions

CHANGES = [
    *((key, name) for axis, key in catalogue.KEYS.items() for name in catalogue.values(axis)),
    *(("attention.qk_norm", True), ("attention.value_residual", True), ("sigma.gamma", "one")),
]


def refusals(model: ModelConfig) -> list[Refusal]:
    """Those of a model whose axes are filled."""
    return [refusal for value in model.axes.each() for refusal in value.refusals(model)]


def _changed(model: ModelConfig, key: str, value: object) -> ModelConfig:
    section, _, name = key.rpartition(".")
    if section == "sigma":
        return model.changed(SigmaOptions(gamma="one"))
    if section:
        return model.changed(attention=model.attention.changed(**{name: value}))
    return model.changed(**{name: value})


@lru_cache
def every_reason() -> frozenset[str]:
    """The reasons of all refusals but those of single numbers."""
    found = set()
    for method in catalogue.METHODS:
        base = catalogue.apply_method(ModelConfig(method=method))
        for (one, first), (other, second) in itertools.combinations(CHANGES, 2):
            found |= {refusal.reason for refusal in refusals(_changed(_changed(base, one, first), other, second))}
    return frozenset(found)
