"""What a checkpoint of a model must hold: every parameter, moment and buffer that is state, each of them complete."""

from collections.abc import Mapping

import torch

from stablelm.checkpoint import saved_run
from stablelm.checkpoint.manifest import COMMITTED, CONFIG, STATE, TENSORS, read_commit
from stablelm.checkpoint.remote_path import CheckpointPath, StoreError
from stablelm.checkpoint.saved_run import read_state
from stablelm.checkpoint.tensor_index import EarlierFormat, TensorIndex, read_index
from stablelm.config.schema import ModelConfig, TrainConfig
from stablelm.engine.updates.state import is_hidden, state_shapes
from stablelm.errors import CheckpointError, ConfigError
from stablelm.methods.catalogue import apply_method
from stablelm.model.initialise import roles
from stablelm.printable import few

MOST_PLACES = 1 << 16
"""Of a stack whose layers are shared: more are no model that anybody trains."""


def expected_shapes(
    model: ModelConfig, train: TrainConfig | None = None, *, optimizer: bool = True
) -> dict[str, torch.Size]:
    """Shape of every tensor that a checkpoint of a resolved model holds, by portable name.

    With the optimizer's state, of `train` (None: the default AdamW), or without it the weights alone.
    """
    from stablelm.model.decoder import Decoder
    from stablelm.private_names import saved_buffers

    with torch.device("meta"):
        decoder = Decoder(model, "fp32")
    parameters = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    buffers = {name: buffer.shape for name, buffer in saved_buffers(decoder).items()}
    shapes = {f"model.{name}": shape for name, shape in (parameters | buffers).items()}
    if optimizer:
        train = train or TrainConfig()
        of_names = roles(decoder)
        for name, shape in parameters.items():
            states = state_shapes(tuple(shape), train, hidden=is_hidden(of_names[name]))
            shapes |= {f"optim.{name}.{state}": own for state, own in states.items()}
    return shapes


def gaps(held: TensorIndex, shapes: Mapping[str, torch.Size]) -> list[str]:
    """Names of the tensors of `shapes` that are missing, of another shape, or not covered exactly once."""
    return [
        name
        for name, shape in shapes.items()
        if (entry := held.tensors.get(name)) is None or entry.shape != shape or not entry.complete
    ]


def problems(path: CheckpointPath, *, optimizer: bool = True, trusted: bool = False) -> list[str]:
    """What a checkpoint lacks of the model that its own configuration describes, in a phrase; empty: it is complete.

    Without `optimizer` the weights alone count. Raises StoreError if an object store does not answer, EarlierFormat
    (a CheckpointError) if an earlier version saved it.
    """
    try:
        state, commit = read_state(path), read_commit(path)
        if state["step"] != commit.step:
            return [f"{STATE} is of step {state['step']}, {COMMITTED} of step {commit.step}"]
        held, model = read_index(path / TENSORS), model_of(path, trusted=trusted)
        # A foreign checkpoint may name a model that is too large even to be described.
        if model.n_layers > MOST_PLACES or model.axes.stack.distinct(model) > len(held.tensors):
            return [f"{CONFIG} has model.n_layers={model.n_layers}, and there are fewer tensors than that"]
        weights = gaps(held, expected_shapes(model, optimizer=False))
    except (StoreError, EarlierFormat):
        raise
    except (CheckpointError, ConfigError, OSError, ValueError, RuntimeError, OverflowError) as error:
        return [f"its contents cannot be checked ({error})"]
    if weights or not optimizer:
        return [f"it was saved incomplete: {few(weights)} missing or incomplete"] if weights else []
    moments = gaps(held, expected_shapes(model, saved_run.saved(path).train))
    if not moments:
        return []
    return [
        f"it was saved incomplete: {few(moments)} missing or incomplete; its weights are complete: "
        f"run.init_from={path} starts a new run from them"
    ]


def model_of(path: CheckpointPath, *, trusted: bool = False) -> ModelConfig:
    """The resolved model section of a checkpoint's config.yaml; what it leaves to be derived is in state.json.

    Raises OSError, ValueError, CheckpointError or ConfigError.
    """
    found = saved_run.model_of(path, trusted=trusted)
    unknown = [name for name in ("kv_heads", "d_ff", "max_seq_len", "vocab_size") if getattr(found, name) is None]
    if unknown:
        raise ValueError(f"{CONFIG} and {STATE} do not give model.{unknown[0]}")
    return apply_method(found)
