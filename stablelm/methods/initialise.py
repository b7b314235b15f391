"""Initial values: one normal draw a parameter, seeded by its name, with a std by its role.

A value depends on (seed, name, shape, config) alone: not on the device, the order of construction,
the world size or any other parameter.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods import spectral
from stablelm.methods.stds import MATRICES, SIZED, TABLES, Role, initial_std
from stablelm.seeds import seed_from

_VECTORS = {"bias": "bias", "gamma": "gamma", "gain": "residual_gain", "mix": "mix", "alpha": "norm_alpha"}


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
    assert kind in MATRICES or kind in TABLES, name
    return Role(kind, layer, factor, sigma)


def _gamma_of(name: str) -> str:
    return f"{name.removesuffix('.weight')}.gamma"


def decays(role: Role) -> bool:
    """Whether AdamW decays the parameter: matrices yes, but not spectrally normalised ones, whose size means nothing.

    Norms, biases, gains, embeddings and positions have no decay.
    """
    return (role.kind in MATRICES or role.kind == "head") and not role.sigma


def initial_values(
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    seed: int,
    start: Callable[[Tensor], spectral.Start] = spectral.start,
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole initial value) of parameters given by clean name and shape, a whole model's or one layer's.

    fp32 on the CPU. With sigma reparametrisation, a matrix comes with its gamma and the buffers u and v (float64),
    for which `start` finds the spectral norm; they are all zeros where it gives zeros.
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
            top, stem = start(value), name.removesuffix(".weight")
            gain = top.sigma if config.sigma.gamma == "spectral" else float(top.sigma > 0)
            yield gamma, torch.full((1,), gain, dtype=torch.float64)
            yield f"{stem}.u", top.u
            yield f"{stem}.v", top.v


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
    if config.init == "orthogonal" and role.kind in SIZED:
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


@torch.no_grad()
def initialise(decoder: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter and buffer of a whole (not sharded) Decoder in place with its initial value."""
    tensors = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    for name, value in initial_values(shapes, config, seed):
        tensors[name].copy_(value)
