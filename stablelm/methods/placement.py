"""The placement axis: which norms a sub-layer has and where, as data."""

from dataclasses import dataclass

from stablelm.config.schema import ModelConfig


@dataclass(frozen=True)
class Placement:
    """The places of norms; `model.sublayer` reads it, nothing else knows the names."""

    before_body: bool = False
    after_write: bool = False
    final: bool = False


PLACEMENTS = {
    "pre": Placement(before_body=True, final=True),
    # The norm after the last write is the final one.
    "post": Placement(after_write=True),
}


def make_placement(config: ModelConfig) -> Placement:
    """The placement of a resolved config."""
    assert config.placement is not None, "apply_method fills model.placement"
    return PLACEMENTS[config.placement]
