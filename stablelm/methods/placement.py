"""The placement axis: which norms a sub-layer has and where, as data."""

from dataclasses import dataclass

from stablelm.config.schema import ModelConfig


@dataclass(frozen=True)
class Placement:
    """The places of norms; `model.sublayer` and the theory read it, nothing else knows the names.

    `before_body`: on what the sub-layer reads; `before_output`: inside the body, before its last matrix (over all
    heads together, or after the activation); `on_branch`: on the body's output; `after_write`: on the stream after
    the sub-layer; `final`: before the head; `by_depth`: the norm before the body is divided by sqrt(layer from 1).
    """

    before_body: bool = False
    before_output: bool = False
    on_branch: bool = False
    after_write: bool = False
    final: bool = False
    by_depth: bool = False


PLACEMENTS = {
    "pre": Placement(before_body=True, final=True),
    # The norm after the last write is the final one.
    "post": Placement(after_write=True),
    # Sub-LN: Wang et al., Magneto, ICML 2023, eqs. 1-5 and 11.
    "sub": Placement(before_body=True, before_output=True, final=True),
    # Kim et al., Peri-LN, ICML 2025.
    "peri": Placement(before_body=True, on_branch=True, final=True),
    "none": Placement(),
    # LayerNorm scaling: Sun et al., The Curse of Depth in Large Language Models, 2025.
    "pre_scaled": Placement(before_body=True, final=True, by_depth=True),
}


def make_placement(config: ModelConfig) -> Placement:
    """The placement of a resolved config."""
    assert config.placement is not None, "apply_method fills model.placement"
    return PLACEMENTS[config.placement]
