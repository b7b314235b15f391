"""What a model keeps for its backward pass, and needs beside that, measured: the real modules run on fake tensors.

Nothing here knows a method: a `MemoryTracker` counts the live storages after each layer of the real decoder. Where all
layers are alike a few of them run and the others add the same; where they differ more run, and their trend goes on.
Every sequence of a micro-batch adds the same bytes, so that two sizes give all of them. Eager execution on torch's CPU
kernels is meant: torch.compile and fused kernels of a GPU may keep less.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stablelm.config.schema import Config, ModelConfig
from stablelm.engine.sharding import recompute_layers
from stablelm.errors import ConfigError
from stablelm.model.decoder import Decoder
from stablelm.model.linear import Dtypes, make_dtypes
from stablelm.model.loss import CHUNK_BYTES, chunked_cross_entropy
from stablelm.plan.memory_tracker import MemoryTracker
from stablelm.private_names import FakeTensorMode, tree_leaves

LAYERS = 6
DIFFERENT_LAYERS = (16, 24)
TREND = 8
SEQUENCES = (2, 3)
KINDS = ("activations", "weight_copies")
Outputs = list[tuple[torch.Size, torch.dtype]]
"""Shapes and dtypes of the tensors that a layer returns."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one micro-batch of a whole model."""

    layers: int
    """Activations that the layers keep."""
    outside: int
    """Those that embedding, final norm and projection keep, less the last layer's output where nothing keeps it."""
    layer_copies: int
    """Copies of the layers' matrices in the compute dtype, of unsharded weights."""
    other_copies: int
    """Copies of matrices outside the layers, the head's not among them."""
    temporary: int
    """What the backward pass of the last layers holds beside all that was kept, without gradients of parameters."""
    recomputed_copies: int
    """Copies of matrices that it makes again to recompute a layer."""
    alike: bool
    """Whether all layers but the first have the same parameters and keep the same bytes."""

    @property
    def kept(self) -> int:
        """Activations kept from the forward pass."""
        return self.layers + self.outside

    def weight_copies(self, *, sharded: bool) -> int:
        """Bytes of the copies kept: none of the layers' matrices where an engine gathers these in the compute dtype."""
        return self.other_copies + (0 if sharded else self.layer_copies)


def measure(config: Config) -> LayerMemory:
    """The memory of a micro-batch of a resolved config."""
    precision, recompute = str(config.train.precision), config.engine.recompute == "full"
    micro = config.train.micro_batch_size
    assert micro is not None
    few, more = (_measure(config.model, precision, config.data.seq_len, recompute, n) for n in SEQUENCES)

    def at_micro(name: str) -> int:
        return _on_line(micro, SEQUENCES, (getattr(few, name), getattr(more, name)))

    names = ("layers", "outside", "layer_copies", "other_copies", "temporary", "recomputed_copies")
    return LayerMemory(**{name: at_micro(name) for name in names}, alike=few.alike)


def with_layers(model: ModelConfig, layers: int) -> ModelConfig:
    """The model with that many layers, or as many more as its method needs (sqrt(1 - k / n_layers) wants some)."""
    depth = min(layers, model.n_layers)
    # One more than the fewest: at the limit itself a scale may be zero and save an operation.
    while depth < model.n_layers and not (_builds(model, depth) and _builds(model, depth - 1)):
        depth += 1
    return replace(model, n_layers=depth)


def _builds(model: ModelConfig, depth: int) -> bool:
    try:
        on_meta(replace(model, n_layers=max(1, depth)), "fp32")
    except (ArithmeticError, ValueError, ConfigError):
        return False
    return True


def on_meta(model: ModelConfig, precision: str) -> Decoder:
    """The decoder of a resolved config, without memory."""
    with torch.device("meta"):
        return Decoder(model, precision)


@lru_cache(maxsize=64)
def _measure(model: ModelConfig, precision: str, seq_len: int, recompute: bool, sequences: int) -> LayerMemory:
    def run(layers: int) -> _Pass:
        return _Pass(with_layers(model, layers), precision, recompute, sequences, seq_len)

    if _same_parameters(model, precision):
        few = run(LAYERS)
        if few.alike:
            return _extended_alike(few, model.n_layers)
    if model.n_layers <= DIFFERENT_LAYERS[1]:
        return _extended_alike(run(model.n_layers), model.n_layers)
    shallow, deep = map(run, DIFFERENT_LAYERS)
    stream = _Pass(model, precision, False, sequences, seq_len, outputs=deep.outputs)
    return _extended_different(shallow, deep, stream)


def _extended_alike(few: "_Pass", n_layers: int) -> LayerMemory:
    """All layers, those that did not run being like the last one."""
    missing = n_layers - few.depth

    def layers(kind: str) -> int:
        return sum(few.layers(kind)) + missing * few.layers(kind)[-1]

    outside = [few.outside(kind) for kind in KINDS]
    backward = few.temporary, few.recomputed_copies
    return LayerMemory(layers(KINDS[0]), outside[0], layers(KINDS[1]), outside[1], *backward, few.alike)


def _extended_different(shallow: "_Pass", deep: "_Pass", stream: "_Pass") -> LayerMemory:
    """All layers from few and from a pass that keeps the stream alone, without the inside of the layers.

    What is inside goes on with the trend of the last layers that ran; the stream, which may merge its tensors now and
    then, has none.
    """
    missing = stream.depth - deep.depth

    def layers(kind: str) -> int:
        inside = [whole - outer for whole, outer in zip(deep.layers(kind), stream.layers(kind), strict=False)]
        before, last = (sum(part) / TREND for part in (inside[-2 * TREND : -TREND], inside[-TREND:]))
        # The mean of the last ones is that of their middle.
        more = missing * (last + (last - before) / TREND * (TREND + missing) / 2)
        return sum(stream.layers(kind)) + sum(inside) + round(more)

    outside = [stream.outside(kind) for kind in KINDS]
    depths = shallow.depth, deep.depth
    backward = (
        _on_line(stream.depth, depths, (shallow.temporary, deep.temporary)),
        _on_line(stream.depth, depths, (shallow.recomputed_copies, deep.recomputed_copies)),
    )
    return LayerMemory(layers(KINDS[0]), outside[0], layers(KINDS[1]), outside[1], *backward, alike=False)


@lru_cache(maxsize=8)
def _same_parameters(model: ModelConfig, precision: str) -> bool:
    """Whether all layers but the first have parameters and buffers of the same names and shapes."""
    layers = on_meta(model, precision).layers[1:]
    return len({tuple((name, tuple(t.shape)) for name, t in layer.state_dict().items()) for layer in layers}) <= 1


class _Pass:
    """One pass of a decoder on fake tensors: forward, and backward to all that enters the last two layers.

    With `outputs` the layers are stand-ins that return these, and nothing runs backward.
    """

    def __init__(
        self,
        model: ModelConfig,
        precision: str,
        recompute: bool,
        sequences: int,
        seq_len: int,
        outputs: list[Outputs] | None = None,
    ):
        self._decoder, self._tracker = on_meta(model, precision).train(), MemoryTracker()
        self.depth = model.n_layers
        self.outputs: list[Outputs] = []
        """What each layer returned."""
        self.temporary = self.recomputed_copies = 0
        self._live: list[Counter[str]] = []
        """Before the first layer and after each."""
        self._shapes: list[list[tuple[int, ...]]] = []
        self._edges: list[list[GradientEdge]] = []
        """What enters each layer: nodes of the graph, for the tensors themselves would stay alive."""
        if outputs is not None:
            later = [outputs[-1]] * (self.depth - len(outputs))
            self._decoder.layers = nn.ModuleList(_StandIn(each) for each in (*outputs, *later))
        elif recompute:
            recompute_layers(self._decoder.layers)
        for layer in self._decoder.layers:
            layer.register_forward_pre_hook(self._enters)
            layer.register_forward_hook(self._leaves)
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._run(torch.zeros(sequences, seq_len, dtype=torch.int64), backward=outputs is None)

    def _run(self, tokens: Tensor, *, backward: bool) -> None:
        tracker = self._tracker
        self._decoder.to_empty(device="cpu")
        tracker.assign(self._decoder.parameters(), "weights")
        tracker.assign(self._decoder.buffers(), "buffers")
        tracker.assign((tokens,), "inputs")
        with tracker:
            hidden = self._decoder(tokens)
            edge, gradient = get_gradient_edge(hidden), torch.empty_like(hidden)
            del hidden  # the loss does not keep it
            tracker.assign((gradient,), "gradients")  # the loss's
            self._kept = +tracker.current
            if backward:
                tracker.backward = True
                tracker.reset_peak()
                torch.autograd.grad(edge, self._edges[max(0, self.depth - 2)], gradient, allow_unused=True)
                self.recomputed_copies = tracker.peak["weight_copies"] - self._kept["weight_copies"]
                self.temporary = tracker.peak.total() - self._kept.total() - self.recomputed_copies

    def _enters(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._live:
            self._live.append(+self._tracker.current)
        if isinstance(layer, _StandIn):
            return
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._shapes.append([tuple(tensor.shape) for tensor in tensors])
        self._edges.append([get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad])

    def _leaves(self, layer: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        self._live.append(+self._tracker.current)
        if not isinstance(layer, _StandIn):
            self.outputs.append([(tensor.shape, tensor.dtype) for tensor in outputs])

    @property
    def alike(self) -> bool:
        """Whether the layers but the first got tensors of the same shapes and added the same bytes."""
        shapes = {tuple(sorted(shapes)) for shapes in self._shapes[1:]}
        added = {(after - before).total() for before, after in pairwise(self._live[1:])}
        return len(shapes) <= 1 and len(added) <= 1

    def layers(self, kind: str) -> list[int]:
        """Bytes that each layer keeps."""
        return [after[kind] - before[kind] for before, after in pairwise(self._live)]

    def outside(self, kind: str) -> int:
        """Bytes that all else keeps."""
        return self._kept[kind] - sum(self.layers(kind))


class _StandIn(nn.Module):
    """A layer that keeps what it gets, for its backward pass, and nothing else."""

    def __init__(self, outputs: Outputs):
        super().__init__()
        self._outputs = outputs

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad)
        return _Keep.apply(self._outputs, *tensors)  # pyright: ignore[reportReturnType]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Outputs, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in outputs)


def loss(config: Config) -> tuple[Counter[str], Counter[str]]:
    """Bytes by kind that the loss of a micro-batch needs beside what the layers keep: at its peak, and from then on.

    The latter is the gradient of the head.
    """
    model, micro = config.model, config.train.micro_batch_size
    assert micro is not None and model.vocab_size is not None
    dtypes = make_dtypes(str(config.train.precision), model.stream_dtype)
    held = Counter(activations=model.vocab_size * model.d_model * dtypes.parameter.itemsize)
    rows = max(1, CHUNK_BYTES // (model.vocab_size * dtypes.parameter.itemsize))
    tokens, sizes = micro * config.data.seq_len, (2 * rows, 3 * rows)
    # Beyond a few chunks of logits each token adds the same.
    few, more = (_loss(model.vocab_size, model.d_model, dtypes, min(tokens, size)) for size in sizes)
    if tokens <= sizes[1]:
        return more, held
    return Counter({kind: _on_line(tokens, sizes, (few[kind], more[kind])) for kind in KINDS}), held


@lru_cache(maxsize=64)
def _loss(vocab: int, d_model: int, dtypes: Dtypes, tokens: int) -> Counter[str]:
    tracker = MemoryTracker()
    with FakeTensorMode():
        hidden = torch.empty(tokens, d_model, dtype=dtypes.compute, requires_grad=True)
        weight = torch.empty(vocab, d_model, dtype=dtypes.parameter, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64)
        tracker.assign((weight,), "weights")
        tracker.assign((targets,), "inputs")
        tracker.assign((hidden,), "activations")
        with tracker:
            chunked_cross_entropy(hidden, weight, targets)
    return Counter({kind: tracker.peak[kind] for kind in KINDS})


def _on_line(at: int, places: tuple[int, int], values: tuple[int, int]) -> int:
    """The value at `at` of the line through two points."""
    return values[0] + (at - places[0]) * (values[1] - values[0]) // (places[1] - places[0])
