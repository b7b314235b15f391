"""Log-likelihoods of continuations on any engine, the same figures in any world size.

Written here because lm-evaluation-harness scores whole models of one process each: it knows no sharded module, and
multiplies every position by the head, not only those that are asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stablelm.config.schema import Config
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.evaluate.choice_items import Request

PADDING = 0
"""Token after the end of a shorter sequence, which no earlier position sees."""


class Likelihood(NamedTuple):
    """Sum of the continuation's log-probabilities in nats, and whether each of its tokens is the likeliest."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class Shapes:
    """Sequences of a micro-batch, tokens of the longest sequence, and the only lengths that a compiled model takes."""

    rows: int
    longest: int
    widths: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Config, rows: int | None = None) -> "Shapes":
        """Of a resolved configuration; `rows`: None for its own."""
        longest = config.model.max_seq_len
        assert longest is not None
        widths = (config.data.seq_len, longest) if config.train.compile else ()
        return cls(rows or config.evaluate.micro_batch_size, longest, widths)


@dataclass(frozen=True)
class _Batch:
    """tokens: (rows, width); places and targets: (n,), the next `lengths[i]` of them those of request `requests[i]`."""

    tokens: Tensor
    places: Tensor
    targets: Tensor
    requests: list[int]
    lengths: list[int]


def loglikelihoods(
    engine: Engine,
    ranks: Ranks,
    requests: Sequence[Request],
    shapes: Shapes,
    reached: Callable[[str], None] = lambda place: None,
) -> list[Likelihood]:
    """One for each request, which are the same on all ranks. Collective.

    A context that does not fit before its continuation loses its start. `reached` is called before each micro-batch
    with its place, on all ranks alike; what it raises ends the scoring. Equal requests are scored once, and requests
    that differ in their last token share a sequence. The sequences are cut into the same micro-batches in every world
    size, by length; rank r takes those ≡ r mod W, and repeats one with nothing to score where it has none left, because
    a sharded model is called by all or by none.
    """
    batches = _batches(requests, shapes)
    found: list[tuple[int, float, bool]] = []
    with evaluating(engine.module):
        for first in range(0, len(batches), ranks.world_size):
            reached(f"micro-batch {first + 1} of {len(batches)}")
            index = first + ranks.rank
            found += _score(engine, batches[min(index, len(batches) - 1)], counts=index < len(batches))
    by_request = {request: Likelihood(*score) for part in ranks.gather(found) for request, *score in part}
    first_of = _first_of(requests)
    return [by_request[first_of[request]] for request in requests]


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


def _score(engine: Engine, batch: _Batch, *, counts: bool) -> list[tuple[int, float, bool]]:
    end = None if counts else 0
    device = engine.device
    scores = engine.scores(batch.tokens.to(device), batch.places[:end].to(device), batch.targets[:end].to(device))
    if not counts:
        return []
    values, greedy = scores.log_probability.double().cpu(), scores.greedy.cpu()
    parts = zip(batch.requests, values.split(batch.lengths), greedy.split(batch.lengths), strict=True)
    return [(request, float(value.sum()), bool(most.all())) for request, value, most in parts]


def _first_of(requests: Sequence[Request]) -> dict[Request, int]:
    """The first place of each request among equal ones."""
    places: dict[Request, int] = {}
    for place, request in enumerate(requests):
        places.setdefault(request, place)
    return places


def _batches(requests: Sequence[Request], shapes: Shapes) -> list[_Batch]:
    """The distinct sequences, the longest first: what does not fit into the memory shows at once."""
    sequences: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for request, place in _first_of(requests).items():
        tokens = (request.context + request.continuation)[-(shapes.longest + 1) :]
        sequences.setdefault(tokens[:-1], []).append((place, request.continuation))
    ordered = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
    cuts = [ordered[start : start + shapes.rows] for start in range(0, len(ordered), shapes.rows)]
    return [_batch([(tokens, sequences[tokens]) for tokens in cut], shapes) for cut in cuts]


def _batch(rows: list[tuple[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]], shapes: Shapes) -> _Batch:
    width, count = len(rows[0][0]), len(rows)
    if shapes.widths:
        width, count = min(w for w in shapes.widths if w >= width), shapes.rows
    tokens = torch.full((count, width), PADDING)
    places: list[int] = []
    targets: list[int] = []
    requests, lengths = [], []
    for row, (inputs, asked) in enumerate(rows):
        tokens[row, : len(inputs)] = torch.tensor(inputs)
        end = row * width + len(inputs)
        for request, continuation in asked:
            places += range(end - len(continuation), end)
            targets += continuation
            requests.append(request)
            lengths.append(len(continuation))
    return _Batch(tokens, torch.tensor(places), torch.tensor(targets), requests, lengths)
