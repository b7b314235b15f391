"""A checkpoint's model tensor by tensor, and tensors that are computed when they are written."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from stablelm.checkpoint.manifest import TENSORS
from stablelm.checkpoint.reader import MODEL_PREFIX, Reader
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.checkpoint.tensor_index import read_index
from stablelm.checkpoint.weights import EvaluatedWeights
from stablelm.evaluate.trained_run import TrainedRun, parameter_names
from stablelm.methods import spectral
from stablelm.methods.axes import M, Model

LAYERS = "layers."


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape; `values` makes it anew at each call: float64, on the CPU."""

    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    def to(self, dtype: torch.dtype) -> Tensor:
        """Its values, rounded once, contiguous."""
        return self.values().to(dtype).contiguous()

    def times(self, factor: float) -> "LazyTensor":
        """All its values multiplied; by 1 they stay what they are to the last bit."""
        return self if factor == 1 else self.map(lambda x: x.mul_(factor))

    def map(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "LazyTensor":
        """`change` of its values, which it may change in place; `shape`: the new one, if it differs."""
        return LazyTensor(self.shape if shape is None else shape, lambda: change(self.values()))

    @property
    def transposed(self) -> "LazyTensor":
        """Of a matrix."""
        return self.map(torch.t, self.shape[::-1])


def constant(shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one value."""
    return LazyTensor(shape, lambda: torch.full(shape, value, dtype=torch.float64))


def joined(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The tensors one after another along the first dimension."""
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), lambda: torch.cat([part.values() for part in parts]))


def unrolled(model: M, weights: "Weights") -> "tuple[M, Weights]":
    """A model of the same function whose layers all have weights of their own, and these."""
    stack = model.axes.stack
    if not stack.shared:
        return model, weights
    return stack.unshared(model), weights.unrolled(stack.places(model))


class Weights:
    """The tensors of a checkpoint's model by the decoder's own names, read one at a time.

    Raises CheckpointError where they are missing or damaged.
    """

    def __init__(self, checkpoint: CheckpointPath, run: TrainedRun | None = None):
        """`run`: whose `evaluate.average` decides which weights are read; None: the trained ones as they are."""
        self._reader = Reader(checkpoint / TENSORS, read_index(checkpoint / TENSORS))
        held = self._reader.index.tensors
        self.shapes: dict[str, tuple[int, ...]] = {
            name.removeprefix(MODEL_PREFIX): tuple(entry.shape)
            for name, entry in held.items()
            if name.startswith(MODEL_PREFIX)
        }
        self._evaluated = None if run is None else EvaluatedWeights.of(checkpoint, run.config)
        self._learned = set() if run is None else parameter_names(run)
        self._sources: dict[str, str] = {}
        """The checkpoint's names of tensors that have another one here."""

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> Tensor:
        """A whole tensor on the CPU, in the dtype in which it was saved."""
        origin = MODEL_PREFIX + self._sources.get(name, name)
        if self._evaluated is None or self._evaluated.trained:
            return self._reader.tensor(origin)
        tensor = torch.empty(self.shapes[name], dtype=self._reader.index.tensors[origin].torch_dtype)
        self._evaluated.load({origin: tensor}, self._learned)
        return tensor

    def lazy(self, name: str) -> LazyTensor:
        """A tensor as it is."""
        return LazyTensor(self.shapes[name], lambda: self.read(name).double())

    def optional(self, name: str) -> LazyTensor | None:
        """A tensor as it is, None where the model has none of that name."""
        return self.lazy(name) if name in self else None

    def unrolled(self, places: Sequence[int]) -> "Weights":
        """Those of the same function with a layer of its own at each place; `places`: the layers that run there."""
        found = copy(self)
        of_layer: dict[int, list[str]] = {}
        for name in self.shapes:
            if name.startswith(LAYERS):
                number, _, _ = name.removeprefix(LAYERS).partition(".")
                of_layer.setdefault(int(number), []).append(name.removeprefix(f"{LAYERS}{number}."))
        found._sources = {name: name for name in self.shapes if not name.startswith(LAYERS)}
        for place, layer in enumerate(places):
            found._sources |= {f"{LAYERS}{place}.{rest}": f"{LAYERS}{layer}.{rest}" for rest in of_layer[layer]}
        found.shapes = {name: self.shapes[source] for name, source in found._sources.items()}
        return found

    def matrix(self, stem: str, model: Model, sublayer: int) -> LazyTensor:
        """The matrix (d_out, d_in) that a map of a sub-layer stands for: reparametrisation and factors multiplied out.

        `stem`: the map's name, without `.weight`.
        """
        if f"{stem}.weight" not in self:
            down, up = self.matrix(f"{stem}.down", model, sublayer), self.matrix(f"{stem}.up", model, sublayer)
            return LazyTensor((up.shape[0], down.shape[1]), lambda: up.values() @ down.values())
        reparam, plain = model.axes.reparam, self.lazy(f"{stem}.weight")
        if not reparam.applies(model, sublayer):
            return plain
        beside = (*reparam.parameters(1, 1), *reparam.buffers(1, 1))

        def scaled(weight: Tensor) -> Tensor:
            own = {name: self.read(f"{stem}.{name}").double() for name in beside}
            own |= {name: weight.new_empty(shape) for name, shape in reparam.derived().items()}
            linear = SimpleNamespace(weight=weight, **own)
            reparam.derive([spectral.whole(linear)], None)
            factor = reparam.factor(linear)
            return weight if factor is None else weight.mul_(factor[:, None])

        return plain.map(scaled)
