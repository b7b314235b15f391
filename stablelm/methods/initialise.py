"""Initial values: one normal draw a parameter, seeded by its name, with a std by its role.

A value depends on (seed, name, shape, config) alone: not on the device, the order of construction,
the world size or any other parameter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.seeds import seed_from

_LEAF_KINDS = {"embedding": "embedding", "position": "position", "head": "head"} | {
    kind: kind for kind in ("query", "key", "value", "output", "fc1", "gate", "fc2")
}


@dataclass(frozen=True)
class Role:
    """What a parameter does.

    `kind`: embedding, position, query, key, value, output, fc1, gate, fc2, head, norm_gain or bias;
    `layer`: its layer from 0, None outside the layers.
    """

    kind: str
    layer: int | None


def roles(decoder: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a Decoder, by name; a tied head is the embedding."""
    return {name: role_of(name) for name, _ in decoder.named_parameters()}


def role_of(name: str) -> Role:
    """The role of the parameter of that name; prefixes of wrappers in the name do no harm."""
    *path, module, leaf = name.split(".")
    layer = int(path[path.index("layers") + 1]) if "layers" in path else None
    if leaf == "bias":
        return Role("bias", layer)
    if module.startswith("norm_"):
        return Role("norm_gain", layer)
    return Role(_LEAF_KINDS[module], layer)


def decays(role: Role) -> bool:
    """Whether AdamW decays the parameter: matrices yes; norms, biases, embeddings and positions no."""
    return role.kind not in ("norm_gain", "bias", "embedding", "position")


def initial_value(name: str, role: Role, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value as an fp32 CPU tensor of that shape: gains 1, biases 0, all else N(0, std^2)."""
    if role.kind == "norm_gain":
        return torch.ones(*shape)
    if role.kind == "bias":
        return torch.zeros(*shape)
    generator = torch.Generator().manual_seed(seed_from(seed, name))
    return torch.randn(*shape, generator=generator).mul_(initial_std(role, shape, config))


def initial_std(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """The std of a parameter's initial values under `model.init`; `shape` is (fan_out, fan_in) for matrices."""
    assert config.init is not None, "apply_method fills model.init"
    return _STDS[config.init](role, shape, config)


def _gpt2(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """0.02, output projections 0.02 / sqrt(2 n_layers): Radford et al. 2019, with nanoGPT's reading of it."""
    if role.kind in ("output", "fc2"):
        return 0.02 / math.sqrt(2 * config.n_layers)
    return 0.02


def _xavier(role: Role, shape: Sequence[int], config: ModelConfig) -> float:
    """sqrt(2 / (fan_in + fan_out)), query, key and value for each head; embeddings and head 1 / sqrt(d_model).

    Glorot & Bengio 2010; heads and embeddings as in the vanilla models of Kedia et al., ICML 2024.
    """
    if role.kind in ("embedding", "position", "head"):
        return config.d_model**-0.5
    fan_out, fan_in = shape
    if role.kind in ("query", "key", "value"):
        fan_out = config.d_model // config.n_heads
    return math.sqrt(2 / (fan_in + fan_out))


_STDS: dict[str, Callable[[Role, Sequence[int], ModelConfig], float]] = {"gpt2": _gpt2, "xavier": _xavier}


@torch.no_grad()
def initialise(decoder: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter of a whole (not sharded) Decoder in place with its initial value."""
    for name, parameter in decoder.named_parameters():
        parameter.copy_(initial_value(name, role_of(name), parameter.shape, config, seed))
