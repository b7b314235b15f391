"""How a parameter's learning rate, decay and Adam epsilon differ from the configured ones (torch-free)."""

from dataclasses import dataclass

from stablelm.config.schema import ModelConfig
from stablelm.methods.scales import depth_ratio, width_ratio


@dataclass(frozen=True)
class Rates:
    """What multiplies `train.lr`, `train.weight_decay` and `train.eps` for a parameter."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def rates(config: ModelConfig, *, in_layer: bool, matrix: bool) -> Rates:
    """The factors for a parameter inside or outside the layers that is a matrix or a vector.

    1 but for init completep (Dey et al. 2025, table 1): in the layers, matrices learn at m_L^(alpha-1) / m_N with
    m_N times the (coupled) decay, vectors at m_L^(alpha-1), and epsilon falls with m_L^-alpha / m_N.
    """
    if config.init != "completep" or not in_layer:
        return Rates()
    depth, width, alpha = depth_ratio(config), width_ratio(config), config.completep.alpha
    by_depth, eps = depth ** (alpha - 1), depth**-alpha / width
    return Rates(by_depth / width, width, eps) if matrix else Rates(by_depth, 1.0, eps)
