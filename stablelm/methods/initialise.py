"""Initial values: one normal draw a parameter, seeded by its name, with a std by its role.

A value depends on (seed, name, shape, config) alone: not on the device, the order of construction,
the world size or any other parameter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods import scales, spectral
from stablelm.methods.solve import solve
from stablelm.methods.widths import d_key_value, widths
from stablelm.seeds import seed_from

_MATRICES = ("query", "key", "value", "output", "fc1", "gate", "fc2", "projection")
_TABLES = ("embedding", "position", "head")
_VECTORS = {"bias": "bias", "gamma": "gamma", "gain": "residual_gain", "mix": "mix", "alpha": "norm_alpha"}
# DeepNet, Magneto and T-Fixup size these; queries and keys only set the logits.
_SIZED = ("value", "output", "fc1", "gate", "fc2")


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


def roles(decoder: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a Decoder, by name; a tied head is the embedding."""
    names = {name for name, _ in decoder.named_parameters()}
    return {name: role_of(name, sigma=_gamma_of(name) in names) for name in names}


def role_of(name: str, *, sigma: bool = False) -> Role:
    """The role of the parameter of that name; prefixes of wrappers in the name do no harm."""
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    leaf, module = parts[-1], parts[-2]
    if leaf == "mix":
        return Role("mix", layer)
    if leaf in _VECTORS:
        return Role(_VECTORS[leaf], layer)
    if module.startswith("norm_"):
        return Role("norm_gain", layer)
    factor = module if module in ("down", "up") else None
    kind = parts[-3] if factor else module
    assert kind in _MATRICES or kind in _TABLES, name
    return Role(kind, layer, factor, sigma)


def _gamma_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.gamma"


def decays(role: Role) -> bool:
    """Whether AdamW decays the parameter: matrices yes, but not spectrally normalised ones, whose size means nothing.

    Norms, biases, gains, embeddings and positions have no decay.
    """
    return (role.kind in _MATRICES or role.kind == "head") and not role.sigma


def initial_values(shapes: dict[str, tuple[int, ...]], config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, whole initial value) of parameters given by clean name and shape, a whole model's or one layer's.

    fp32 on the CPU. With sigma reparametrisation, a matrix comes with its gamma and the buffers u and v (float64).
    """
    for name, shape in shapes.items():
        gamma = _gamma_of(name)
        sigma = name.endswith(".weight") and gamma in shapes
        role = role_of(name, sigma=sigma)
        if role.kind == "gamma":
            continue  # given with its matrix
        value = initial_value(name, role, shape, config, seed)
        yield name, value
        if sigma:
            start = spectral.start(value)
            stem = name.removesuffix(".weight")
            yield gamma, torch.full((1,), start.sigma if config.sigma.gamma == "spectral" else 1.0)
            yield f"{stem}.u", start.u
            yield f"{stem}.v", start.v


def initial_value(name: str, role: Role, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of any parameter but a gamma, an fp32 CPU tensor of that shape.

    Gains 1, biases 0, rezero's gains 0, dense averages the newest output alone, dyt's slope `norm_alpha`;
    init orthogonal: queries 0 and orthogonal matrices; all else N(0, std^2).
    """
    if role.kind == "norm_gain":
        return torch.ones(*shape)
    if role.kind in ("bias", "residual_gain"):
        return torch.zeros(*shape)
    if role.kind == "norm_alpha":
        return torch.full(tuple(shape), config.norm_alpha)
    if role.kind == "mix":
        return torch.eye(shape[0])[-1]
    if config.init == "orthogonal" and role.kind == "query":
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(seed_from(seed, name))
    value = torch.randn(*shape, generator=generator)
    if config.init == "orthogonal" and role.kind in _SIZED:
        return _orthogonal(value)
    return value.mul_(initial_std(role, shape, config))


def _orthogonal(gaussian: Tensor) -> Tensor:
    """A uniform orthogonal matrix times max(1, sqrt(d_out / d_in)), which keeps the size of its input's features.

    As "scaled-corrected uniform orthogonal" of Martens et al. 2021.
    """
    d_out, d_in = gaussian.shape
    tall = gaussian if d_out >= d_in else gaussian.t()
    q, r = torch.linalg.qr(tall.double())
    q = q * r.diagonal().sign()
    return ((q if d_out >= d_in else q.t()) * max(1.0, math.sqrt(d_out / d_in))).float().contiguous()


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
    return _glorot(role, shape, config) * (math.sqrt(math.log(2 * config.n_layers)) if role.kind in _SIZED else 1)


def _deepnet(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, times (8 n_layers)^(-1/4) for the same matrices (Wang et al. 2022, section 3, decoder-only)."""
    return _glorot(role, shape, config) * ((8 * config.n_layers) ** -0.25 if role.kind in _SIZED else 1)


def _tfixup(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """Glorot's std, times 0.67 n_layers^(-1/4) for the same matrices (Huang et al., ICML 2020, section 3.2).

    The encoder's constant, for a GPT layer has two sub-layers as an encoder's has.
    """
    return _glorot(role, shape, config) * (0.67 * config.n_layers**-0.25 if role.kind in _SIZED else 1)


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


@torch.no_grad()
def initialise(decoder: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter and buffer of a whole (not sharded) Decoder in place with its initial value."""
    tensors = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    for name, value in initial_values(shapes, config, seed):
        tensors[name].copy_(value)
