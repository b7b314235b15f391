"""A model at its initialisation, measured with the memory of a few layers.

Layers are built one at a time, forward and then backward, by the model's own code and with its own initial values; in
between the stream is kept in temporary files.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.model import branch_factors
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initial_values
from stablelm.model.linear import Linear, derive
from stablelm.model.loss import chunked_cross_entropy
from stablelm.model.sublayer import Chunks, Layer
from stablelm.observe.layer_hooks import Internals, LayerGauge, internals, norm, stream_figures
from stablelm.observe.layers import tev
from stablelm.probe.changes import RELATIVE, Change, FirstUpdate, Growth, independent_copies, relative_change, taken
from stablelm.probe.disk_offload import to_disk
from stablelm.seeds import seed_from

TRIM_EVERY = 8


@dataclass(frozen=True)
class Measured:
    """Figures by depth and of the whole: mean loss (nats), `tev` of the embedding's tokens, spectral norms by name.

    `sensitivity`: of the stream at the end to random changes of the layers' matrices, |change|^2 / |stream|^2 for
    relative changes of size 1 (the limit of small ones); `growth`: by the first update. Both None unless asked.
    """

    internals: Internals
    loss: float
    tev: tuple[float, float]
    sigma: dict[str, float]
    sensitivity: float | None = None
    growth: Growth | None = None


def measure(
    config: ModelConfig,
    tokens: Tensor,
    targets: Tensor,
    *,
    precision: str,
    seed: int,
    pieces: int,
    folder: Path,
    z_loss: float = 0.0,
    update: FirstUpdate | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> Measured:
    """Forward and backward at initialisation in training mode, so with dropout; tokens, targets: (rows, seq) int64.

    `precision` is fp32 or fp64; `seed`: as `run.seed`; the first `pieces` rows of the embedding are tokens; `folder`
    holds the temporary files; `on_layer` is called 2 n_layers times. Equal to a whole Decoder's pass whose generator is
    reseeded at each boundary with `boundary_seed`. In memory at once: a layer with its gradients, embedding and
    head, and the gradient of the whole stream. `update` asks for sensitivity and growth: two more passes forward, of
    the same dropout (`on_layer` is called 4 n_layers times). Raises StorageError if the folder is full.
    """
    with torch.random.fork_rng([]):
        walk = _Walk(config, precision, seed, tokens, folder, on_layer, update)
        walk.forward()
        loss = walk.finish(targets, z_loss)
        for index in reversed(range(config.n_layers)):
            walk.backward(index)
        walk.start()
        found = Measured(walk.internals(), loss, tev(walk.decoder.embedding.weight[:pieces].detach()), walk.sigma)
        if update is None:
            return found
        sensitivity = walk.sensitivity(independent_copies(config, seed))
        return replace(found, sensitivity=sensitivity, growth=walk.growth(update, targets))


def boundary_seed(seed: int, index: int) -> int:
    """Seed of the dropout after boundary `index` of the stream; -1: of the embedding."""
    return seed_from("probe", seed, index)


class _Walk:
    """The state of one forward and one backward pass through the stack."""

    def __init__(
        self,
        config: ModelConfig,
        precision: str,
        seed: int,
        tokens: Tensor,
        folder: Path,
        on_layer: Callable[[], None],
        update: FirstUpdate | None,
    ):
        self._config, self._seed, self._tokens, self._on_layer = config, seed, tokens, on_layer
        self._folder, self._update = folder, update
        self._change: Change = lambda name, value: None
        self._directions: dict[str, Tensor] = {}
        """Of `update`, on disk, by the parameter's name."""
        self._hidden = torch.empty(0)
        self._spectral: dict[str, Tensor] = {}
        with torch.device("meta"):
            self.decoder = Decoder(config, precision)
        self.decoder.train()
        self._materialise_outside()
        self._positions = self.decoder.positions(tokens)
        self._boundaries: list[Chunks] = []
        """The stream after the embedding (0) and after each layer, on disk."""
        self._values: Chunks = ()
        self._rows: list[dict[str, Tensor]] = []
        self._gradient: tuple[Tensor, ...] = ()
        self._values_gradient: tuple[Tensor, ...] = ()
        self._shared_gradients: dict[int, tuple[Tensor, ...]] = {}
        self._table_gradient: Tensor | None = None
        self._gradients: list[Tensor] = []  # these two from the top down
        self._weight_gradients: list[Tensor] = []
        self.sigma: dict[str, float] = {}

    def _materialise_outside(self) -> None:
        for name, part in self.decoder.named_children():
            if name != "layers":
                self._materialise(name, part)

    def _materialise(self, prefix: str, part: nn.Module) -> None:
        """Gives a part its seeded initial values; spectral norms are computed once and kept: they take longest."""
        part.to_empty(device="cpu")
        parameters = {f"{prefix}.{name}": parameter for name, parameter in part.named_parameters()}
        tensors = parameters | {f"{prefix}.{name}": buffer for name, buffer in part.named_buffers()}
        known = {name: self._spectral[name] for name in tensors if name in self._spectral}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items() if name not in known}
        reparam = self._config.axes.reparam
        beside = tuple(f".{own}" for own in (*reparam.parameters(1, 1), *reparam.buffers(1, 1)))
        with torch.no_grad():
            for name, value in initial_values(shapes, self._config, self._seed):
                tensors[name].copy_(value)
                if name.endswith(beside):
                    self._spectral[name] = value.clone()  # it may be a row of a whole factor
            for name, value in known.items():
                tensors[name].copy_(value)
            for name, parameter in parameters.items():
                change = self._change(name, parameter)
                if change is not None:
                    parameter.add_(change)
        derive(part)

    @contextmanager
    def _layer(self, index: int) -> Iterator[Layer]:
        """The layer at place `index` with its initial values, which are freed at the end."""
        number = self.decoder.places[index]
        layer = self.decoder.layers[number]
        assert isinstance(layer, Layer)
        self._materialise(f"layers.{number}", layer)
        torch.manual_seed(boundary_seed(self._seed, index))
        yield layer
        layer.to_empty(device="meta")
        if index % TRIM_EVERY == 0:
            _trim()
        self._on_layer()

    @torch.no_grad()
    def forward(self) -> None:
        """Forward through the layers; keeps the stream at each boundary."""
        self._keep(self.decoder.stream.start(self._embed()), {})
        for index in range(self._config.n_layers):
            chunks = self._boundaries[index]
            with self._layer(index) as layer:
                gauge = LayerGauge(layer)
                new = layer(chunks, self._positions, self._values, factors=self._factors(index))
                gauge.remove()
                self.sigma |= _spectral_norms(layer, f"layers.{self.decoder.places[index]}")
            if layer.gives_values:
                new, self._values = new[:-1], new[-1:]
            self._keep(self._after(chunks, new), gauge.figures)

    def _embed(self) -> Tensor:
        torch.manual_seed(boundary_seed(self._seed, -1))
        return self.decoder.embed(self._tokens)

    def _after(self, chunks: Chunks, new: Chunks) -> Chunks:
        """The stream after a layer, which made `new` of it."""
        return self.decoder.stream.settle(self.decoder.stream.join(chunks, new))

    def _keep(self, chunks: Chunks, figures: dict[str, Tensor]) -> None:
        before = {id(chunk): chunk for chunk in self._boundaries[-1]} if self._boundaries else {}
        made = {id(chunk): chunk for chunk in chunks if id(chunk) not in before}
        on_disk = before | dict(zip(made, to_disk(made.values(), self._folder), strict=True))
        chunks = tuple(on_disk[id(chunk)] for chunk in chunks)
        state = self.decoder.stream.state
        earlier = state(self._boundaries[-1]) if self._boundaries else ()
        self._boundaries.append(chunks)
        self._rows.append(stream_figures(state(chunks), earlier) | figures)

    def finish(self, targets: Tensor, z_loss: float) -> float:
        """Loss and its gradient to the last boundary; returns the mean cross-entropy."""
        decoder, chunks = self.decoder, _leaves(self._boundaries[-1])
        hidden = decoder.finish(chunks)
        self._hidden = hidden.detach()
        sums = chunked_cross_entropy(hidden.flatten(0, 1), decoder.head_weight(), targets.flatten(), z_loss=z_loss)
        tied = [decoder.embedding.weight] if decoder.head is None else []
        after = self._at_the_end() if self._update is not None else {}
        # A stream may hold outputs that only later layers read: no gradient from here.
        found = torch.autograd.grad(
            sums.total / sums.valid, [*chunks, *after.values(), *tied], allow_unused=True, materialize_grads=True
        )
        self._reach(found[: len(chunks)])
        self._direct(after, found[len(chunks) :])
        self._table_gradient = found[-1] if tied else None
        return float(sums.cross_entropy / sums.valid)

    def _at_the_end(self) -> dict[str, nn.Parameter]:
        """Parameters outside the layers that follow them, but a tied table, by name."""
        before = ("embedding.", "position.", "norm_embedding.", "layers.")
        return {name: p for name, p in self.decoder.named_parameters() if not name.startswith(before)}

    def _direct(self, parameters: Mapping[str, Tensor], gradients: Sequence[Tensor]) -> None:
        """Keeps the directions of the update, if there is one."""
        if self._update is None:
            return
        made = [
            self._update.direction(name, gradient)
            for name, gradient in zip(parameters, gradients[: len(parameters)], strict=True)
        ]
        self._directions |= dict(zip(parameters, to_disk(made, self._folder), strict=True))

    def _reach(self, gradient: tuple[Tensor, ...]) -> None:
        """Takes the gradient to a boundary."""
        self._gradient = gradient
        self._gradients.append(norm(self.decoder.stream.state_gradient(gradient)))

    def backward(self, index: int) -> None:
        """Backward through layer `index`, which runs again from its stored input with the same dropout."""
        chunks, values = _leaves(self._boundaries[index]), ()
        with self._layer(index) as layer:
            if not layer.gives_values:
                values = _leaves(self._values)
            new, own = layer(chunks, self._positions, values, factors=self._factors(index)), ()
            if layer.gives_values:
                new, own = new[:-1], new[-1:] if self._values_gradient else ()
            prefix = f"layers.{self.decoder.places[index]}"
            named = {f"{prefix}.{name}": parameter for name, parameter in layer.named_parameters()}
            if self._update is None:
                named = {name: parameter for name, parameter in named.items() if parameter.ndim == 2}
            gradient = (*self._gradient, *(self._values_gradient if own else ()))
            after = self._after(chunks, new)
            # A stream may hold what only other layers read.
            found = torch.autograd.grad(
                (*after, *own),
                [*chunks, *values, *named.values()],
                gradient,
                allow_unused=True,
                materialize_grads=True,
            )
            width = len(chunks)
            learned = self._summed(index, found[width + len(values) :])
            if self._is_first(index):
                self._direct(named, learned)
        self._add_weight_gradient(index, tuple(each for each in learned if each.ndim == 2))
        self._add_to_values(found[width : width + len(values)])
        self._reach(found[:width])

    def _is_first(self, index: int) -> bool:
        """Whether its layer runs at no place before this one."""
        return self.decoder.places.index(self.decoder.places[index]) == index

    def _summed(self, index: int, gradient: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the layer at a place, with those of its later places where it is shared."""
        number = self.decoder.places[index]
        kept = self._shared_gradients.pop(number, None)
        if kept is not None:
            gradient = tuple(map(torch.add, kept, gradient))
        if not self._is_first(index):
            self._shared_gradients[number] = gradient
        return gradient

    def _add_weight_gradient(self, index: int, gradient: tuple[Tensor, ...]) -> None:
        """A shared layer has one gradient, known at its first place and standing at each."""
        self._weight_gradients.append(norm(gradient))
        if not (self._config.axes.stack.shared and self._is_first(index)):
            return
        for later, layer in enumerate(reversed(self.decoder.places[index:])):
            if layer == self.decoder.places[index]:
                self._weight_gradients[later] = self._weight_gradients[-1]

    def _factors(self, index: int) -> Tensor | None:
        found = branch_factors.usual(self._config, self.decoder.dtypes, training=True)
        return None if found is None else found[index]

    def _add_to_values(self, gradient: tuple[Tensor, ...]) -> None:
        if gradient and self._values_gradient:
            gradient = (self._values_gradient[0] + gradient[0],)
        self._values_gradient = gradient or self._values_gradient

    def start(self) -> None:
        """Backward through the embedding."""
        before = ("embedding.", "position.", "norm_embedding.")
        named = {name: p for name, p in self.decoder.named_parameters() if name.startswith(before)}
        found = torch.autograd.grad(self.decoder.stream.start(self._embed()), list(named.values()), self._gradient)
        gradients = dict(zip(named, found, strict=True))
        if self._table_gradient is not None:
            gradients["embedding.weight"] = gradients["embedding.weight"] + self._table_gradient
        self._weight_gradients.append(norm((gradients["embedding.weight"],)))
        self._direct(named, list(gradients.values()))

    @torch.no_grad()
    def _again(self, change: Change) -> Chunks:
        """The stream at the end once `change` is made to every layer's parameters, with the dropout of before."""
        self._change = change
        chunks, values = self.decoder.stream.start(self._embed()), ()
        for index in range(self._config.n_layers):
            with self._layer(index) as layer:
                new = layer(chunks, self._positions, values, factors=self._factors(index))
            if layer.gives_values:
                new, values = new[:-1], new[-1:]
            chunks = self._after(chunks, new)
        return chunks

    def sensitivity(self, change: Change) -> float:
        """Of the stream at the end to a change that is `RELATIVE` times as large as the weights."""
        before, after = self._state(self._boundaries[-1]), self._state(self._again(change))
        return relative_change(before, after) / RELATIVE**2

    @torch.no_grad()
    def growth(self, update: FirstUpdate, targets: Tensor) -> Growth:
        """By the update along the directions that the backward pass kept; the walk's last pass."""
        self._change = taken(update, self._directions)
        self._materialise_outside()
        chunks = self._again(self._change)
        hidden, state = self.decoder.finish(chunks), self.decoder.stream.state(chunks)
        figures, first = stream_figures(state), self._rows[-1]["stream_variance"]
        weight = self.decoder.head_weight()
        sums = chunked_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten())
        return Growth(
            relative_change(self._hidden, hidden) ** 0.5,
            float(figures["stream_variance"] / first),
            float(figures["token_correlation"]),
            float(sums.cross_entropy / sums.valid),
        )

    def _state(self, chunks: Chunks) -> Tensor:
        return torch.cat(self.decoder.stream.state(chunks), dim=-1)

    def internals(self) -> Internals:
        """The figures, once the embedding is reached."""
        return internals(self._rows, self._gradients[::-1], self._weight_gradients[::-1])


def _trim() -> None:
    """Returns freed memory to the system: glibc keeps what lies between small blocks in use, some MB a layer."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _leaves(chunks: Chunks) -> Chunks:
    return tuple(chunk.detach().requires_grad_() for chunk in chunks)


def _spectral_norms(layer: Layer, prefix: str) -> dict[str, float]:
    """v^T W u of every spectrally normalised matrix of a layer, by name."""
    return {
        f"{prefix}.{name}": part.sigma.item()
        for name, part in layer.named_modules()
        if isinstance(part, Linear) and hasattr(part, "u")
    }
