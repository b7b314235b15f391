"""Initial values: one normal draw a parameter, seeded by its name, with a std by its role.

A value depends on (seed, name, shape, config) alone: not on the device, the order of construction,
the world size or any other parameter.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods import spectral
from stablelm.methods.axes import MATRICES, TABLES, Added, Role
from stablelm.methods.roles import WRITING
from stablelm.methods.stds import initial_std
from stablelm.model.linear import Linear, derive
from stablelm.seeds import seed_from


def roles(decoder: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a Decoder, by name; a tied head is the embedding."""
    reparametrised = {
        f"{name}.weight"
        for name, part in decoder.named_modules()
        if isinstance(part, Linear) and part.reparam is not None and part.reparam.scale_free
    }
    maps = {f"{name}.{own}" for name, part in decoder.named_modules() for own in getattr(part, "added_maps", ())}
    names = [name for name, _ in decoder.named_parameters()]
    found = {name: role_of(name, reparametrised=name in reparametrised) for name in names}
    return {name: role._replace(added_map=True) if name in maps else role for name, role in found.items()}


def role_of(name: str, *, reparametrised: bool = False) -> Role:
    """The role of the parameter of that name; prefixes of wrappers in the name do no harm.

    What is no matrix, table, bias or part of a norm has the kind of its own name.
    """
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else None
    leaf, module = parts[-1], parts[-2]
    if leaf == "bias":
        return Role("bias", layer)
    if module.startswith("norm_"):
        return Role("norm_gain" if leaf == "weight" else f"norm_{leaf}", layer)
    if leaf != "weight":
        return Role(leaf, layer)
    factor = module if module in ("down", "up") else None
    kind = parts[-3] if factor else module
    assert kind in MATRICES or kind in TABLES, name
    return Role(kind, layer, factor, reparametrised)


def decays(role: Role) -> bool:
    """Whether AdamW decays the parameter: matrices yes, but not reparametrised ones, whose size means nothing.

    Norms, biases, embeddings, positions and what axis values add have no decay, but for their maps.
    """
    return (role.kind in MATRICES or role.kind == "head" or role.added_map) and not role.reparametrised


def initial_values(
    shapes: dict[str, tuple[int, ...]],
    config: ModelConfig,
    seed: int,
    start: Callable[[Tensor], spectral.Start] = spectral.start,
) -> Iterator[tuple[str, Tensor]]:
    """(name, whole initial value) of parameters given by clean name and shape, a whole model's or one layer's.

    fp32 on the CPU. A reparametrised matrix comes with the parameters and buffers beside it (float64), for which
    `start` finds the largest singular value; they are all zeros where it gives zeros. What `model.linear.derive` finds
    is left to it.
    """
    reparam = config.axes.reparam
    beside = tuple(f".{own}" for own in reparam.parameters(1, 1))
    for name, shape in shapes.items():
        if name.endswith(beside):
            continue  # given with its matrix
        role = role_of(name)
        place = config.axes.stack.first_place(config, role.layer or 0)
        sublayer = 2 * place + (".feedforward." in name)
        applies = role.layer is not None and role.kind in MATRICES and reparam.applies(config, sublayer)
        value = initial_value(name, role, shape, config, seed)
        own: dict[str, Tensor] = {}
        if applies and reparam.replaces:
            own = reparam.split(value, config, initial_std(role, shape, config))
        elif applies:
            own = reparam.starts(value, config, start)
        yield name, own.pop("weight", value)
        yield from ((f"{name.removesuffix('.weight')}.{beside}", first) for beside, first in own.items())


def initial_value(name: str, role: Role, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The initial value of any parameter but those beside a reparametrised matrix, an fp32 CPU tensor of that shape.

    Gains 1, biases 0, the slope of a norm and its factor of the embeddings as it says, what other axis values add as
    they say; of matrices what `model.init` says, N(0, std^2) as a rule.
    """
    init = config.axes.init
    if role.kind == "norm_gain":
        return torch.ones(*shape)
    if role.kind == "norm_alpha":
        return torch.full(tuple(shape), config.axes.norm.slope(config, ".attention." in name))
    if role.kind == "embedding_gain":
        gain = config.axes.norm.embedding_gain(config)
        assert gain is not None
        return torch.full(tuple(shape), gain)
    if role.kind == "bias" or init.starts_at_zero(role.kind):
        return torch.zeros(*shape)
    if role.kind not in MATRICES and role.kind not in TABLES:
        added = _added(name, role, config)
        return _drawn(name, shape, seed) * added.std if added.std else torch.tensor(added.start, dtype=torch.float32)
    value = _drawn(name, shape, seed)
    partner = init.partner(role.kind)
    beside = None if partner is None else _drawn(name.replace(f".{role.kind}.", f".{partner}."), shape[::-1], seed)
    shaped = init.shaped(role.kind, value, beside)
    value = value.mul_(initial_std(role, shape, config)) if shaped is None else shaped
    if role.kind in WRITING or role.kind in ("embedding", "position"):
        return config.axes.norm.start(value, 0 if role.kind in WRITING else 1)
    return value


def _drawn(name: str, shape: Sequence[int], seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed_from(seed, name)))


def _added(name: str, role: Role, config: ModelConfig) -> Added:
    """What an axis value adds to the head, layer, sub-layer or body under that name."""
    axes = config.axes
    if role.layer is None:
        return next(parameter for parameter in axes.gains.in_head(config) if parameter.name == role.kind)
    parts, place = name.split("."), axes.stack.first_place(config, role.layer)
    sublayer = 2 * place + ("feedforward" in parts)
    if parts[-2].isdigit():
        found = axes.stream.in_layer(config, place)
    elif parts[-2] == "body":
        of_attention = () if sublayer % 2 else axes.each()
        found = [added for value in of_attention for added in value.in_attention(config, place)]
        found += axes.gains.in_body(config, sublayer)
    else:
        found = axes.stream.in_sublayer(config, sublayer)
    return next(parameter for parameter in found if parameter.name == role.kind)


@torch.no_grad()
def initialise(decoder: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter and buffer of a whole (not sharded) Decoder in place with its initial value."""
    tensors = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    for name, value in initial_values(shapes, config, seed):
        tensors[name].copy_(value)
    derive(decoder)
