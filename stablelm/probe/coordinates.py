"""Coordinate check: how large features are after each of the first steps, over depths and widths at one rate.

A parametrisation whose best rate carries over from a small model to a large one keeps the size of features, and of what
a step changes in them, independent of both (Yang et al. 2021, arXiv 2203.03466, appendix D.1; Dey et al. 2025, arXiv
2505.01618, for depth).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.model.decoder import Decoder
from stablelm.model.sublayer import Chunks, Layer
from stablelm.observe.layer_hooks import mean_square
from stablelm.train.step import train_step

STEPS = 10
LIMIT = 0.2
"""Largest slope in log-log that passes: a factor of 1.15 from a model to one twice as deep or wide."""
FIGURES = ("stream", "stream_change", "branches", "logits", "logits_change")
"""Root mean squares: of the stream after the last layer, of its change since the start, of the branches as written
before their scale (mean over layers), of the logits and of their change."""
SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)


@dataclass(frozen=True)
class SizeSeries:
    """Models that differ in one size: `figures` (models, STEPS + 1, len(FIGURES)) float64, by growing size."""

    axis: str
    sizes: tuple[int, ...]
    fixed: int
    figures: np.ndarray

    def slopes(self) -> dict[str, float]:
        """d log(figure) / d log(size) after the last step; nan where a figure is not finite or zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            logs, size = np.log(self.figures[:, -1]), np.log(np.array(self.sizes, dtype=np.float64))
        found = {}
        for name, column in zip(FIGURES, logs.T, strict=True):
            finite = np.isfinite(column).all()
            found[name] = float(np.polyfit(size, column, 1)[0]) if finite else math.nan
        return found

    def growing(self) -> list[str]:
        """The figures that grow faster than `LIMIT`, or are not finite."""
        return [name for name, slope in self.slopes().items() if not slope <= LIMIT]


def measure_line(
    axis: str, configs: dict[int, Config], fixed: int, tokens: Tensor, targets: Tensor, on_step: Callable[[], None]
) -> SizeSeries:
    """Trains a model of each resolved config, by size, `STEPS` steps at `train.lr` on the batch; (rows, seq) each.

    `on_step` is called STEPS + 1 times a model.
    """
    sizes = tuple(sorted(configs))
    rows = [figures_of(configs[size], tokens, targets, on_step) for size in sizes]
    return SizeSeries(axis, sizes, fixed, np.array(rows, dtype=np.float64))


def figures_of(
    config: Config, tokens: Tensor, targets: Tensor, on_step: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """(STEPS + 1, len(FIGURES)) of a model of a resolved config, trained at `train.lr` on the batch."""
    with torch.random.fork_rng([]):
        return _measured(config, tokens, targets, on_step)


def _measured(config: Config, tokens: Tensor, targets: Tensor, on_step: Callable[[], None]) -> list[list[float]]:
    precision = "fp64" if config.train.precision == "fp64" else "fp32"
    config = replace(config, train=replace(config.train, precision=precision, compile=False))
    engine = build_engine(config, "single", SINGLE)
    start, rows = None, []
    for step in range(STEPS + 1):
        if step:
            train_step(
                engine, SINGLE, tokens, targets, step=step, lr=config.train.lr, seed=config.run.seed, micro=len(tokens)
            )
        stream, branches, logits = _features(engine, tokens)
        start = start or (stream, logits)
        pair = stream, stream - start[0], logits, logits - start[1]
        one, change, other, moved = (math.sqrt(mean_square(each)) for each in pair)
        rows.append([one, change, branches, other, moved])
        on_step()
    return rows


@torch.no_grad()
def _features(engine: Engine, tokens: Tensor) -> tuple[Tensor, float, Tensor]:
    """The stream after the last layer, the mean RMS of the branches, and the logits, without dropout."""
    decoder, last = engine.module, []

    def tap(index: int, chunks: Chunks) -> Chunks:
        if index == decoder.config.n_layers:
            last.append(torch.cat(decoder.stream.state(chunks), dim=-1).clone())
        return chunks

    was_training = decoder.training
    decoder.eval()
    decoder.tap = tap
    try:
        with _branch_sizes(decoder) as sizes:
            hidden = decoder(tokens)
            assert isinstance(hidden, Tensor)
            logits = decoder.logits(hidden)
    finally:
        decoder.tap = None
        decoder.train(was_training)
    return last[0], float(np.mean(sizes)), logits


@contextmanager
def _branch_sizes(decoder: Decoder) -> Iterator[list[float]]:
    """RMS of every branch of the passes inside, in order."""
    sizes: list[float] = []

    def keep(dropout: object, arguments: object, branch: Tensor) -> None:
        sizes.append(math.sqrt(mean_square(branch)))

    places = [
        each.dropout
        for part in decoder.layers
        if isinstance(part, Layer)
        for each in (part.attention, part.feedforward)
    ]
    handles = [place.register_forward_hook(keep) for place in places]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()
