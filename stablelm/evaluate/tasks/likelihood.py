"""Log-likelihoods of continuations on any engine, the same figures in any world size.

Written here because lm-evaluation-harness scores whole models of one process each: it knows no sharded module, and
multiplies every position by the head, not only those that are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.tasks.choice_items import Request
from stablelm.model.loss import TokenScores

PADDING = 0
"""Token after the end of a shorter sequence, which no earlier position sees."""


class Likelihood(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether each of its tokens is the likeliest."""

    log_probability: float
    greedy: bool


class Scorer(Protocol):
    """What is needed of an `Engine`."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def device(self) -> torch.device: ...

    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> TokenScores: ...


@dataclass(frozen=True)
class Shapes:
    """Sequences of a micro-batch, tokens of the longest sequence, and the only lengths that a compiled model takes."""

    rows: int
    longest: int
    widths: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config, rows: int | None = None) -> "Shapes":
        """Of a resolved configuration, whose `train.compile` is settled; `rows`: None for its own."""
        longest = config.model.max_seq_len
        assert longest is not None
        widths = (config.data.seq_len, longest) if config.train.compile is True else ()
        return cls(rows or config.evaluate.micro_batch_size, longest, widths)


@dataclass(frozen=True)
class _Batch:
    """tokens: (rows, width); places and targets: (n,), the next `len(window.continuation)` of them each window's."""

    tokens: Tensor
    places: Tensor
    targets: Tensor
    windows: list[Request]


def loglikelihoods(
    engine: Scorer,
    ranks: Ranks,
    requests: Sequence[Request],
    shapes: Shapes,
    reached: Callable[[str], None] = lambda place: None,
) -> list[Likelihood]:
    """One for each request, which are the same on all ranks. Collective.

    A context that does not fit before its continuation loses its start; a continuation that does not fit itself is
    scored in windows, each of its tokens with at least half a sequence before it. Equal requests are scored once, and
    requests that differ in their last token share a sequence. The sequences are cut into the same micro-batches in
    every world size, by length; rank r takes those ≡ r mod W, and repeats one with nothing to score where it has none
    left, because a sharded model is called by all or by none. `reached` is called before each micro-batch with its
    place, on all ranks alike; what it raises ends the scoring.
    """
    windows = {request: _windows(request, shapes.longest) for request in requests}
    batches = _batches([window for own in windows.values() for window in own], shapes)
    found: list[tuple[Request, float, bool]] = []
    with evaluating(engine.module):
        for first in range(0, len(batches), ranks.world_size):
            reached(f"micro-batch {first + 1} of {len(batches)}")
            index = first + ranks.rank
            found += _score(engine, batches[min(index, len(batches) - 1)], counts=index < len(batches))
    scored = {window: Likelihood(*score) for part in ranks.gather(found) for window, *score in part}
    return [_together([scored[window] for window in windows[request]]) for request in requests]


def _windows(request: Request, longest: int) -> list[Request]:
    """The request itself, or where its continuation does not fit, parts of it after as much as fits before them."""
    context, rest = request
    if len(rest) <= longest:
        return [Request((context + rest)[-(longest + 1) : -len(rest)], rest)]
    size = (longest + 1) // 2
    cuts = [(context + rest[:start], rest[start : start + size]) for start in range(0, len(rest), size)]
    return [Request(before[-(longest + 1 - len(part)) :], part) for before, part in cuts]


def _together(scores: list[Likelihood]) -> Likelihood:
    return Likelihood(sum(score.log_probability for score in scores), all(score.greedy for score in scores))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout within the block."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def _score(engine: Scorer, batch: _Batch, *, counts: bool) -> list[tuple[Request, float, bool]]:
    end = None if counts else 0
    device = engine.device
    scores = engine.scores(batch.tokens.to(device), batch.places[:end].to(device), batch.targets[:end].to(device))
    if not counts:
        return []
    lengths = [len(window.continuation) for window in batch.windows]
    values, greedy = scores.log_probability.double().cpu().split(lengths), scores.greedy.cpu().split(lengths)
    parts = zip(batch.windows, values, greedy, strict=True)
    return [(window, float(value.sum()), bool(most.all())) for window, value, most in parts]


def _batches(windows: Sequence[Request], shapes: Shapes) -> list[_Batch]:
    """The distinct sequences, the longest first: what does not fit into the memory shows at once."""
    sequences: dict[tuple[int, ...], list[Request]] = {}
    for window in dict.fromkeys(windows):
        sequences.setdefault((window.context + window.continuation)[:-1], []).append(window)
    ordered = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
    cuts = [ordered[start : start + shapes.rows] for start in range(0, len(ordered), shapes.rows)]
    return [_batch([(tokens, sequences[tokens]) for tokens in cut], shapes) for cut in cuts]


def _batch(rows: list[tuple[tuple[int, ...], list[Request]]], shapes: Shapes) -> _Batch:
    width, count = len(rows[0][0]), len(rows)
    if shapes.widths:
        width, count = min(w for w in shapes.widths if w >= width), shapes.rows
    tokens = torch.full((count, width), PADDING)
    places: list[int] = []
    targets: list[int] = []
    for row, (inputs, windows) in enumerate(rows):
        tokens[row, : len(inputs)] = torch.tensor(inputs)
        end = row * width + len(inputs)
        for _, continuation in windows:
            places += range(end - len(continuation), end)
            targets += continuation
    asked = [window for _, windows in rows for window in windows]
    return _Batch(tokens, torch.tensor(places), torch.tensor(targets), asked)
