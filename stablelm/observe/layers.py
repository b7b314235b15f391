"""Every layer measured in a pass of its own: for a whole Decoder, and every so many steps of a run."""

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablelm.engine.after_step import Reparametrised
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name
from stablelm.model.decoder import Decoder
from stablelm.model.devices import to_device
from stablelm.model.sublayer import Chunks, Layer
from stablelm.observe.layer_hooks import Internals, LayerGauge, internals, norm, stream_figures
from stablelm.observe.sharpness import sharpness
from stablelm.observe.updates import UpdateRatios

TOKENS = 1024


def rows_for(seq_len: int) -> int:
    """Rows of the fixed batch: `TOKENS` tokens, or one sequence; it depends on no engine or batch size."""
    return max(1, TOKENS // seq_len)


class Recorder:
    """Measures the next forward and backward pass of a Decoder (wrapped or not) that run inside the context."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._gauges: list[LayerGauge] = []
        self._rows: list[dict[str, Tensor]] = []
        self._before: Chunks = ()
        self.gradients: list[Tensor] = []
        """Norms of the gradient to the stream, by index, once the backward pass is done."""

    def __enter__(self) -> "Recorder":
        self._gauges = [LayerGauge(part) for part in self._decoder.modules() if isinstance(part, Layer)]
        self.gradients = [torch.zeros(())] * (len(self._decoder.places) + 1)
        self._decoder.tap = self._tap
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.tap, self._before = None, ()
        for gauge in self._gauges:
            gauge.remove()

    def rows(self) -> list[dict[str, Tensor]]:
        """Forward figures by index, for `internals`."""
        return self._rows

    def _tap(self, index: int, chunks: Chunks) -> Chunks:
        own = self._gauges[self._decoder.places[index - 1]].taken() if index else {}
        with torch.no_grad():
            measured = self._decoder.stream.state(chunks)
            self._rows.append(stream_figures(measured, self._before) | own)
            self._before = tuple(chunk.detach() for chunk in measured)
        return _Watch.apply(partial(self._keep, index), *chunks)  # pyright: ignore[reportReturnType]

    def _keep(self, index: int, gradients: tuple[Tensor, ...]) -> None:
        self.gradients[index] = norm(self._decoder.stream.state_gradient(gradients))


class _Watch(torch.autograd.Function):
    """The same tensors again: what comes back to them came through later layers alone."""

    @staticmethod
    def forward(ctx: Any, keep: Callable[[tuple[Tensor, ...]], None], *chunks: Tensor) -> tuple[Tensor, ...]:
        ctx.keep = keep
        return tuple(chunk.view_as(chunk) for chunk in chunks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.keep(gradients)
        return None, *gradients


def measure(engine: Engine, ranks: Ranks, tokens: Tensor, targets: Tensor) -> Internals:
    """Figures of a pass over (rows, seq) tokens without dropout, the same ones on every rank; changes nothing.

    Call on all ranks with the same tokens. Gradients are cleared, generators restored, compiled layers run
    eagerly, because hooks are not called in compiled ones.
    """
    decoder = engine.module
    assert isinstance(decoder, Decoder)
    was_training = decoder.training
    decoder.eval()
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"), Recorder(decoder) as recorder:
        boundaries = engine.module.boundaries(tokens, engine.device)
        tokens, targets = to_device(tokens, engine.device), to_device(targets, engine.device)
        sums = engine.loss(tokens, targets, boundaries=boundaries)
        # The engine adds up over ranks, and all run the same rows.
        engine.backward(sums.total / (sums.valid * ranks.world_size), last=True)
        found = internals(recorder.rows(), recorder.gradients, weight_gradient_norms(engine))
    engine.clear_gradients()
    decoder.train(was_training)
    return found


def weight_gradient_norms(engine: Engine) -> list[Tensor]:
    """Norm of each layer's matrix gradients by index, 0: the embedding table; a collective.

    A shared layer has one gradient, which stands at each of its places.
    """
    # ZeRO-3 leaves parameters empty and their shapes in `ds_shape`.
    named = engine.module.named_parameters()
    matrices = {clean_name(name) for name, p in named if len(getattr(p, "ds_shape", p.shape)) == 2}
    squares: dict[int, Tensor] = {}
    for name, own in engine.gradient_norms().items():
        layer = re.match(r"layers\.(\d+)\.", name)
        if name in matrices and (layer or name == "embedding.weight"):
            index = int(layer[1]) + 1 if layer else 0
            squares[index] = squares.get(index, torch.zeros(())) + own.square()
    return [squares[index].sqrt() for index in (0, *(layer + 1 for layer in engine.module.places))]


def tev(rows: Tensor) -> tuple[float, float]:
    """Token embedding variability, a cheap sign of unstable pretraining (arXiv 2409.07787); rows: (vocab, d_model).

    Mean and standard deviation over the vocabulary of each row's standard deviation, both population.
    """
    spread = rows.std(dim=1, correction=0).double()
    return float(spread.mean()), float(spread.std(correction=0))


class LayerObserver:
    """Measures the model each `every` steps (0: never) on a fixed batch and records every layer under names by depth.

    `sharpness_every`: steps between measurements of the sharpness on it (0: never); `batch` reads it, the same on all
    ranks and in all attempts; `pieces`: rows of the embedding that are tokens; `record` takes metrics by name.
    """

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        *,
        every: int,
        sharpness_every: int = 0,
        batch: Callable[[], tuple[Tensor, Tensor]],
        pieces: int,
        record: Callable[[dict[str, Any]], None],
    ):
        self._engine, self._ranks = engine, ranks
        self._every, self._sharpness_every = every, sharpness_every
        self._pieces, self._record = pieces, record
        self._updates = UpdateRatios(engine, ranks)
        # Read once, by one rank, before the clock starts.
        self._batch = ranks.consensus().first(batch) if every or sharpness_every else None
        self.slowest = 0.0
        """Longest measurement so far, seconds."""

    def before(self, step: int) -> None:
        """Call before every step on all ranks."""
        if _due(step, self._every):
            self._updates.before()

    def step(self, step: int, tokens: int) -> None:
        """Call after every step on all ranks; `tokens`: trained on so far."""
        layers, sharp = _due(step, self._every), _due(step, self._sharpness_every)
        if self._batch is None or not (layers or sharp):
            return
        started = time.perf_counter()
        found = self._layers(self._batch) if layers else {}
        if sharp:
            found["sharpness"] = sharpness(self._engine, self._ranks, *self._batch)
        found["layers_seconds"] = time.perf_counter() - started
        self.slowest = max(self.slowest, found["layers_seconds"])
        self._record({"step": step, "tokens": tokens, **found})

    def _layers(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        found = self._updates.after()
        found |= depth_metrics(measure(self._engine, self._ranks, *batch)) | sigma_metrics(self._engine.matrices)
        mean, std = tev(self._engine.whole("embedding.weight")[: self._pieces])
        return found | {"embedding/tev_mean": mean, "embedding/tev_std": std}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def depth_metrics(found: Internals) -> dict[str, float]:
    """`layer/<index>/...` from the embedding (0000) on and `attention/<index>/...` from layer 0001 on."""
    columns = {
        "stream_rms": np.sqrt(found.stream_variance),
        "branch_rms": np.sqrt(found.branch_variance),
        "grad_norm": found.gradient_norm,
        "weight_grad_norm": found.weight_gradient_norm,
        "token_correlation": found.token_correlation,
        "kurtosis": found.kurtosis,
        "angular_distance": found.angular_distance,
    }
    heads = {"entropy": found.attention_entropy, "logit_max": found.logit_max, "sink_share": found.attention_sink}
    metrics: dict[str, float] = {}
    for index in range(len(found.stream_variance)):
        metrics |= {f"layer/{index:04d}/{name}": float(column[index]) for name, column in columns.items()}
    for index in range(1, len(found.stream_variance)):
        metrics |= {f"attention/{index:04d}/{name}": float(column[index]) for name, column in heads.items()}
    return metrics


def sigma_metrics(sigma: Reparametrised) -> dict[str, float]:
    """`sigma/<index>/<role>`, the tracked norms, and `sigma/tracking_error`, the largest; none without sigma."""
    norms = sigma.norms()
    if not norms:
        return {}
    metrics = {sigma_name(name): value for name, value in norms.items()}
    metrics["sigma/tracking_error"] = max(sigma.tracking_errors().values())
    return metrics


def sigma_name(name: str) -> str:
    """`layers.3.attention.body.query` -> `sigma/0004/query`: the index counts as in `layer/`."""
    _, layer, _, _, role = name.split(".", 4)
    return f"sigma/{int(layer) + 1:04d}/{role}"
