"""What answers of axis values are made of: roles and widths of parts, rates, added parameters, refusals."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MATRICES = ("query", "key", "value", "head_gate", "output", "fc1", "gate", "fc2", "projection")
TABLES = ("embedding", "position", "head")
BRANCH_MATRICES = ("value", "output", "fc1", "gate", "fc2")
"""The matrices on a branch's own path; queries and keys only set the logits."""


class Refusal(NamedTuple):
    """A combination that is not run: the keys to blame, why, and what to use instead."""

    keys: tuple[str, ...]
    reason: str


class Widths(NamedTuple):
    """Features of what a sub-layer reads, of all its heads together, and of its branch's output."""

    read: int
    attention: int
    branch: int


class Role(NamedTuple):
    """What a parameter does.

    `kind`: embedding, position, head; query, key, value, head_gate, output, fc1, gate, fc2, projection; norm_gain,
    norm_alpha, bias; or the name of a parameter that an axis value adds. `layer`: its layer from 0, None outside the
    layers; `factor`: down or up for the factors of a low-rank map; `reparametrised`: whether a reparametrisation makes
    the function independent of its norm.
    """

    kind: str
    layer: int | None
    factor: str | None = None
    reparametrised: bool = False


class Added(NamedTuple):
    """A parameter that an axis value adds to a sub-layer or a layer: its name there, and its initial value.

    `start` has the parameter's shape. Such parameters have no weight decay.
    """

    name: str
    start: Array


class Rates(NamedTuple):
    """What multiplies `train.lr`, `train.weight_decay` and `train.eps` for a parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0
