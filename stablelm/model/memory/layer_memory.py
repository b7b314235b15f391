"""What a model keeps for its backward pass, and needs beside that, measured: the real modules run on fake tensors.

Nothing here knows a method: a `MemoryTracker` counts the live storages after each layer of the real decoder. Where all
layers are alike a few of them run and the others add the same; where their widths or inputs grow with the depth, what
all need is a parabola in it. Every sequence of a micro-batch adds the same bytes, so that two sizes give all of them.
Eager execution on torch's CPU kernels is meant: torch.compile and fused kernels of a GPU may keep less.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from stablelm.config.memory_rules import period
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError
from stablelm.model.decoder import Decoder
from stablelm.model.linear import Dtypes, make_dtypes
from stablelm.model.loss import chunk_rows, chunked_cross_entropy
from stablelm.model.memory import recompute
from stablelm.model.memory.memory_tracker import MemoryTracker
from stablelm.private_names import FakeTensorMode, tree_leaves

LAYERS = 6
DIFFERENT_LAYERS = (8, 16, 24)  # a stream that merges its tensors does so every eight layers
SEQUENCES = (2, 3)
KINDS = ("activations", "weight_copies")
FIGURES = (
    *("layers", "outside", "layer_copies", "other_copies", "temporary", "recomputed_copies"),
    *("last_layer", "last_layer_copies"),
)


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
    last_layer: int
    """What the last layer adds to `layers`."""
    last_layer_copies: int
    alike: bool
    """Whether all layers but the first have the same parameters and keep the same bytes."""

    @property
    def kept(self) -> int:
        """Activations kept from the forward pass."""
        return self.layers + self.outside

    def weight_copies(self, *, sharded: bool) -> int:
        """Bytes of the copies kept: none of the layers' matrices where an engine gathers these in the compute dtype."""
        return self.other_copies + (0 if sharded else self.layer_copies)

    def with_more(self, layers: int) -> "LayerMemory":
        """Of a model with that many layers more (fewer if negative), all like the last one."""
        return replace(
            self,
            layers=self.layers + layers * self.last_layer,
            layer_copies=self.layer_copies + layers * self.last_layer_copies,
        )


def measure(config: Config) -> LayerMemory:
    """The memory of a micro-batch of a resolved config, whose recompute mode is concrete.

    A shared layer keeps at each place what a layer of its own would.
    """
    stack = config.model.axes.stack
    places = stack.places(config.model)
    config = replace(config, model=stack.unshared(config.model))
    mode, each = config.engine.recompute, period(config.engine.recompute)
    if each is None or each == 1:
        return _measured(config, mode)
    return _mixed(_measured(config, "none"), _measured(config, "full"), mode, places)


def _mixed(plain: LayerMemory, full: LayerMemory, mode: str, places: list[int]) -> LayerMemory:
    """Of a model of whose layers a mode recomputes some; growing layers as if both kinds were spread evenly.

    `places`: the layer that runs at each.
    """
    again, n_layers = sum(recompute.is_recomputed(mode, layer) for layer in places), len(places)

    def mean(name: str) -> int:
        return round(((n_layers - again) * getattr(plain, name) + again * getattr(full, name)) / n_layers)

    return replace(
        full if recompute.is_recomputed(mode, places[-1]) else plain,
        **{name: mean(name) for name in ("layers", "layer_copies", "last_layer", "last_layer_copies")},
        temporary=max(plain.temporary, full.temporary),
        recomputed_copies=full.recomputed_copies,
        alike=False,
    )


def _measured(config: Config, mode: str) -> LayerMemory:
    precision, micro = str(config.train.precision), config.train.micro_batch_size
    assert micro is not None
    few, more = (_measure(config.model, precision, config.data.seq_len, mode, n) for n in SEQUENCES)

    def at_micro(name: str) -> int:
        return extended(micro, SEQUENCES, (getattr(few, name), getattr(more, name)))

    return LayerMemory(**{name: at_micro(name) for name in FIGURES}, alike=few.alike)


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
def _measure(model: ModelConfig, precision: str, seq_len: int, mode: str, sequences: int) -> LayerMemory:
    def run(layers: int) -> _Pass:
        return _pass(with_layers(model, layers), precision, mode, sequences, seq_len)

    if _same_parameters(model, precision):
        few = run(LAYERS)
        if few.alike:
            return _extended_alike(few, model.n_layers)
    passes = [run(layers) for layers in DIFFERENT_LAYERS if layers < model.n_layers]
    depths = [each.depth for each in passes]
    if len(set(depths)) < len(DIFFERENT_LAYERS):
        return _extended_alike(run(model.n_layers), model.n_layers)
    some = [_extended_alike(each, each.depth) for each in passes]
    figures = {name: extended(model.n_layers, depths, [getattr(each, name) for each in some]) for name in FIGURES}
    return LayerMemory(**figures, alike=False)


def _extended_alike(few: "_Pass", n_layers: int) -> LayerMemory:
    """All layers, those that did not run being like the last one."""
    missing = n_layers - few.depth

    def layers(kind: str) -> int:
        return sum(few.layers(kind)) + missing * few.layers(kind)[-1]

    outside = [few.outside(kind) for kind in KINDS]
    backward, last = (few.temporary, few.recomputed_copies), tuple(few.layers(kind)[-1] for kind in KINDS)
    figures = (layers(KINDS[0]), outside[0], layers(KINDS[1]), outside[1], *backward, *last)
    return LayerMemory(**dict(zip(FIGURES, figures, strict=True)), alike=few.alike)


@lru_cache(maxsize=8)
def _same_parameters(model: ModelConfig, precision: str) -> bool:
    """Whether all layers but the first have parameters and buffers of the same names and shapes."""
    layers = on_meta(model, precision).layers[1:]
    return len({tuple((name, tuple(t.shape)) for name, t in layer.state_dict().items()) for layer in layers}) <= 1


class _Pass:
    """One pass of a decoder on fake tensors: forward, and backward to all that enters the last two layers."""

    def __init__(self, model: ModelConfig, precision: str, mode: str, sequences: int, seq_len: int):
        self._decoder, self._tracker = on_meta(model, precision).train(), MemoryTracker()
        self.depth = model.n_layers
        self._live: list[Counter[str]] = []
        """Before the first layer and after each."""
        self._shapes: list[list[tuple[int, ...]]] = []
        self._edges: list[list[GradientEdge]] = []
        """What enters each layer: nodes of the graph, for the tensors themselves would stay alive."""
        recompute.apply(self._decoder.layers, mode, dropout=model.dropout)
        for layer in self._decoder.layers:
            layer.register_forward_pre_hook(self._enters)
            layer.register_forward_hook(self._leaves)
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._run(torch.zeros(sequences, seq_len, dtype=torch.int64))

    def _run(self, tokens: Tensor) -> None:
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
            tracker.backward = True
            tracker.reset_peak()
            torch.autograd.grad(edge, self._edges[max(0, self.depth - 2)], gradient, allow_unused=True)
        self.recomputed_copies = tracker.peak["weight_copies"] - self._kept["weight_copies"]
        self.temporary = tracker.peak.total() - self._kept.total() - self.recomputed_copies

    def _enters(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._live:
            self._live.append(+self._tracker.current)
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self._shapes.append([tuple(tensor.shape) for tensor in tensors])
        self._edges.append([get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad])

    def _leaves(self, layer: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        self._live.append(+self._tracker.current)

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


_pass = lru_cache(maxsize=16)(_Pass)
"""Models that differ in depth alone are measured by the same few layers."""


def loss(config: Config, device: str = "cpu") -> tuple[Counter[str], Counter[str]]:
    """Bytes by kind that the loss of a micro-batch needs beside what the layers keep: at its peak, and from then on.

    The latter is the gradient of the head. `device`: the type of the one that is meant, by which the loss chooses how
    many logits to hold.
    """
    model, micro = config.model, config.train.micro_batch_size
    assert micro is not None and model.vocab_size is not None
    dtypes = make_dtypes(str(config.train.precision), model.stream_dtype)
    held = Counter(activations=model.vocab_size * model.d_model * dtypes.parameter.itemsize)
    rows = chunk_rows(model.vocab_size, dtypes.compute, device)
    tokens, sizes = micro * config.data.seq_len, (2 * rows, 3 * rows)
    # Beyond a few chunks of logits each token adds the same.
    few, more = (_loss(model.vocab_size, model.d_model, dtypes, min(tokens, size), rows) for size in sizes)
    if tokens <= sizes[1]:
        return more, held
    return Counter({kind: extended(tokens, sizes, (few[kind], more[kind])) for kind in KINDS}), held


@lru_cache(maxsize=64)
def _loss(vocab: int, d_model: int, dtypes: Dtypes, tokens: int, rows: int) -> Counter[str]:
    tracker = MemoryTracker()
    with FakeTensorMode():
        hidden = torch.empty(tokens, d_model, dtype=dtypes.compute, requires_grad=True)
        weight = torch.empty(vocab, d_model, dtype=dtypes.parameter, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.int64)
        tracker.assign((weight,), "weights")
        tracker.assign((targets,), "inputs")
        tracker.assign((hidden,), "activations")
        with tracker:
            chunked_cross_entropy(hidden, weight, targets, chunk_bytes=rows * vocab * dtypes.compute.itemsize)
    return Counter({kind: tracker.peak[kind] for kind in KINDS})


def extended(at: int, places: Sequence[int], values: Sequence[int]) -> int:
    """The value at `at` of the polynomial of the lowest degree through these points, by Lagrange's formula."""
    terms = (
        value * math.prod(Fraction(at - other, place - other) for other in places if other != place)
        for place, value in zip(places, values, strict=True)
    )
    return round(sum(terms))
