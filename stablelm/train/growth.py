"""A deeper run that begins with the weights of a shallower one: `run.grow_from`, by the orders of `run.growth`.

`stack`: the whole stack again and again on top of itself (Gong et al., Efficient Training of BERT by Progressively
Stacking, ICML 2019). `repeat`: each layer several times in a row. `zero`: in that order too, and what comes last in the
branches of all but the first copy of a layer is zero, so that the deeper model computes what the shallower one does
(Wang et al., LEMON: Lossless Model Expansion, ICLR 2024, for pre-norm residual streams). The optimizer state is new.
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial

from torch import Tensor

from stablelm.checkpoint import contents, selection
from stablelm.checkpoint.format import load_tensors
from stablelm.config.schema import ModelConfig, RunConfig
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import FlatShard, local_part
from stablelm.errors import CheckpointError, ConfigError
from stablelm.methods.roles import WRITING

DEPTH = "n_layers"
MAY_DIFFER = (DEPTH, "method", "dropout", "depth_drop", "options", "attention")
"""Of the section `model`; the axes say what a method means, and `options` and `attention` are compared by parts."""
LAYERS = "model.layers."


def grown_from(run: RunConfig, engine: Engine, model: ModelConfig, ranks: Ranks) -> None:
    """Loads the weights of `run.grow_from` into the layers of a new run's deeper model. Collective.

    Raises ConfigError where the checkpoint's model does not fit, or cannot be grown in that way.
    """
    assert run.grow_from is not None
    found = selection.resolve_checkpoint(
        run.grow_from, consensus=ranks.consensus(), lacks=partial(contents.problems, optimizer=False)
    )
    try:
        source = ranks.consensus().first(lambda: contents.model_of(found))
    except (OSError, ValueError, CheckpointError) as error:
        raise ConfigError(f"run.grow_from={found} cannot be read: {error}") from error
    if reasons := list(obstacles(source, model, run.growth)):
        raise ConfigError(f"run.grow_from={run.grow_from} with run.growth={run.growth}: {'; '.join(reasons)}")
    tensors, sources = engine.tensors(optimizer=False), layers_from(run.growth, source.n_layers, model.n_layers)
    try:
        for names in _rounds(tensors, sources):
            load_tensors(found / "tensors", names, ranks.cpu_group, partial=True)
    except CheckpointError as error:
        raise ConfigError(f"run.grow_from={found} does not fit this model: {error}") from error
    if run.growth == "zero":
        for name, tensor in tensors.items():
            if _is_last(name, model) and (layer := _layer_of(name)) and sources[layer] == sources[layer - 1]:
                _local(tensor).zero_()
    engine.loaded()


def layers_from(growth: str, shallow: int, deep: int) -> list[int]:
    """The layer of the shallower model that each layer of the deeper one is a copy of."""
    if growth == "stack":
        return [layer % shallow for layer in range(deep)]
    return [layer * shallow // deep for layer in range(deep)]


def obstacles(source: ModelConfig, model: ModelConfig, growth: str) -> Iterator[str]:
    """Why a model cannot grow out of another one, each with a fix."""
    if source.n_layers >= model.n_layers:
        yield (
            f"it has {source.n_layers} layers and this run model.n_layers={model.n_layers}; "
            "use more, or run.init_from for as many"
        )
        return
    stream = model.axes.stream
    if stream.grows or stream.layers_differ:
        yield "the layers have parameters of other shapes at each depth; use model.stream=residual in both"
    elif different := list(_differences(source, model)):
        yield f"models that grow differ in depth alone, and here also in {', '.join(different)}; use the same"
    elif model.axes.stack.shared:
        yield "its layers are shared, so that a deeper one has no new layers; use run.init_from, and more repeats"
    elif growth == "zero":
        yield from _not_preserved(source, model)


def _differences(source: ModelConfig, model: ModelConfig) -> Iterator[str]:
    places = model.axes.position.adds_table
    names = [field.name for field in fields(ModelConfig) if field.name not in MAY_DIFFER]
    for name in names:
        if (name != "max_seq_len" or places) and getattr(source, name) != getattr(model, name):
            yield f"model.{name} ({getattr(source, name)} there, {getattr(model, name)} here)"
    attention = source.attention, model.attention
    for name in (field.name for field in fields(model.attention) if field.name != "document_end"):
        there, here = (getattr(each, name) for each in attention)
        if there != here:
            yield f"model.attention.{name} ({there} there, {here} here)"
    kinds = {type(options) for options in (*source.options, *model.options)}
    yield from (f"model.{kind.SECTION}" for kind in kinds if source.option(kind) != model.option(kind))


def _not_preserved(source: ModelConfig, model: ModelConfig) -> Iterator[str]:
    """Why the function would change although the new branches are zero."""
    axes, other = model.axes, "; use run.growth=stack"
    stream, placement, deep = axes.stream, axes.placement, model.n_layers
    if placement.after_write:
        yield f"norms on the stream (model.placement={placement.name}) change it where a branch is zero{other}"
    if stream.export_obstacle(model) is not None or stream.gains(model)[0] != 1 or not stream.has_skip:
        yield f"model.stream={stream.name} does not leave the stream as it is where a branch is zero{other}"
    elif stream.gains(model) != stream.gains(source):
        yield f"what multiplies the branches of model.stream={stream.name} depends on the depth{other}"
    if axes.reparam.applies(model, 0) or axes.reparam.applies(model, 1):
        yield f"a matrix of zeros has no meaning under model.reparam={axes.reparam.name}{other}"
    mapped = enumerate(layers_from("zero", source.n_layers, deep))
    if any(placement.input_scale(here) != placement.input_scale(there) for here, there in mapped):
        yield f"model.placement={placement.name} scales norms by the depth{other}"
    if axes.shaping.active:
        yield f"model.attention.shaping={axes.shaping.name} depends on the depth{other}"
    activation = axes.activation
    if activation.modelling(source) != activation.modelling(model):
        yield f"model.activation={activation.name} depends on the depth{other}"
    scales = [(init.axes.init.embedding_scale(init), init.axes.init.head_scale(init)) for init in (source, model)]
    if scales[0] != scales[1]:
        yield f"scales of model.init={axes.init.name} depend on the depth{other}"


def _rounds(tensors: dict[str, Tensor], sources: list[int]) -> Iterator[dict[str, Tensor]]:
    """The tensors of a model by names of the checkpoint, a copy of each layer a round."""
    rest = {name: tensor for name, tensor in tensors.items() if _layer_of(name) is None}
    copies = [sources[:layer].count(source) for layer, source in enumerate(sources)]
    for number in range(max(copies) + 1):
        found = dict(rest) if number == 0 else {}
        for name, tensor in tensors.items():
            layer = _layer_of(name)
            if layer is not None and copies[layer] == number:
                tail = name.removeprefix(f"{LAYERS}{layer}.")
                found[f"{LAYERS}{sources[layer]}.{tail}"] = tensor
        yield found


def _layer_of(name: str) -> int | None:
    return int(name.removeprefix(LAYERS).partition(".")[0]) if name.startswith(LAYERS) else None


def _is_last(name: str, model: ModelConfig) -> bool:
    """Whether a branch is zero if this tensor, and others of its module, are."""
    *_, module, leaf = name.split(".")
    last = module == "norm_branch" if model.axes.placement.on_branch else module in WRITING
    return last and leaf in ("weight", "bias")


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, to be changed in place."""
    return tensor.local if isinstance(tensor, FlatShard) else local_part(tensor)
