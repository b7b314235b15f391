"""The std of a parameter's initial values, by its role and the init (torch-free)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stablelm.config.schema import ModelConfig
from stablelm.methods import scales
from stablelm.methods.solve import solve
from stablelm.methods.widths import d_key_value, widths

MATRICES = ("query", "key", "value", "output", "fc1", "gate", "fc2", "projection")
TABLES = ("embedding", "position", "head")
# DeepNet, Magneto and T-Fixup size these; queries and keys only set the logits.
SIZED = ("value", "output", "fc1", "gate", "fc2")


@dataclass(frozen=True)
class Role:
    """What a parameter does.

    `kind`: embedding, position, head; query, key, value, output, fc1, gate, fc2, projection; norm_gain, norm_alpha,
    bias, gamma (of sigma reparametrisation), residual_gain (rezero's), mix (a dense stream's averages); `layer`: its
    layer from 0, None outside the layers; `factor`: down or up for the factors of a low-rank map; `sigma`: whether
    it is a spectrally normalised matrix.
    """

    kind: str
    layer: int | None
    factor: str | None = None
    sigma: bool = False


def initial_std(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """The std of a parameter's initial values under `model.init`; `shape` is (fan_out, fan_in) for matrices."""
    if role.kind in ("embedding", "position"):
        return scales.embedding_std(config)
    if role.kind == "head":
        return 0.02 if config.init in ("gpt2", "completep") else config.d_model**-0.5
    if role.kind == "projection":
        return shape[1] ** -0.5
    assert config.init is not None, "apply_method fills model.init"
    if role.factor is None:
        return _STDS[config.init](role, shape, config)
    return _factor_std(role, shape, config)


def _factor_std(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """The std of both factors that gives their product the std s of the whole map: (s^2 / rank)^(1/4) (ours)."""
    assert config.init is not None
    assert role.layer is not None
    width = widths(config, 2 * role.layer)
    whole = (width.attention if role.kind == "query" else d_key_value(config), width.read)
    inner = shape[0] if role.factor == "down" else shape[1]
    return (_STDS[config.init](Role(role.kind, role.layer), whole, config) ** 2 / inner) ** 0.25


def _gpt2(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """0.02, output projections 0.02 / sqrt(2 n_layers): Radford et al. 2019, with nanoGPT's reading of it."""
    if role.kind in ("output", "fc2"):
        return 0.02 / math.sqrt(2 * config.n_layers)
    return 0.02


def _glorot(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010)."""
    return math.sqrt(2 / sum(shape))


def _xavier(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, query, key and value for each head, as in the vanilla models of Kedia et al., ICML 2024."""
    if role.kind in ("query", "key", "value"):
        return math.sqrt(2 / (shape[1] + config.d_model // config.n_heads))
    return _glorot(role, shape, config)


def _fan_in(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """1 / sqrt(fan_in): keeps the variance of what comes in (LeCun et al. 1998)."""
    return shape[1] ** -0.5


def _magneto(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, times sqrt(ln 2 n_layers) for value, output, fc1, gate, fc2 (Wang et al., ICML 2023, section 3)."""
    return _glorot(role, shape, config) * (math.sqrt(math.log(2 * config.n_layers)) if role.kind in SIZED else 1)


def _deepnet(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, times (8 n_layers)^(-1/4) for the same matrices (Wang et al. 2022, section 3, decoder-only)."""
    return _glorot(role, shape, config) * ((8 * config.n_layers) ** -0.25 if role.kind in SIZED else 1)


def _tfixup(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, times 0.67 n_layers^(-1/4) for the same matrices (Huang et al., ICML 2020, section 3.2).

    The encoder's constant, for a GPT layer has two sub-layers as an encoder's has.
    """
    return _glorot(role, shape, config) * (0.67 * config.n_layers**-0.25 if role.kind in SIZED else 1)


def _completep(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """0.02 / sqrt(m_N), output projections too (Dey et al. 2025, table 1)."""
    return 0.02 / math.sqrt(scales.width_ratio(config))


def _solved(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Branches of unit variance: `methods.solve`."""
    assert role.layer is not None
    sublayer = 2 * role.layer + (role.kind in ("fc1", "gate", "fc2"))
    return solve(config)[sublayer][role.kind]


_STDS: dict[str, Callable[[Role, Sequence[int], ModelConfig], float]] = {
    "gpt2": _gpt2,
    "xavier": _xavier,
    "fan_in": _fan_in,
    "magneto": _magneto,
    "deepnet": _deepnet,
    "tfixup": _tfixup,
    "completep": _completep,
    "deepscale": _solved,
    "unit": _solved,
    "orthogonal": _fan_in,
}
