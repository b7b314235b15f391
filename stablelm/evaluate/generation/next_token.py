"""The next token of each row from its logits: greedy, or drawn at a temperature from the likeliest tokens."""

import torch
from torch import Tensor

from stablelm.evaluate.generation.sampling import Sampling


def choose(logits: Tensor, sampling: Sampling, drawn: list[float], seen: Tensor | None = None) -> list[int]:
    """One token a row. logits: (rows, vocab); `drawn`: a number from [0, 1) for each row, unused at temperature 0.

    `seen`: (rows, vocab) bool, the tokens that the repetition penalty concerns.
    """
    if sampling.temperature == 0:
        return _penalised(logits, sampling, seen).argmax(dim=-1).tolist()
    sums = probabilities(logits, sampling, seen).cumsum(dim=-1)
    # Scaled by the sum, so that rounding leaves nothing above it; the first sum above it is of a token with a share.
    target = torch.tensor(drawn, dtype=sums.dtype, device=sums.device)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, target, right=True)[:, 0]
    last = (sums < sums[:, -1:]).sum(dim=-1)
    return torch.minimum(found, last).tolist()


def probabilities(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """(rows, vocab) float64: from which tokens are drawn, the excluded ones 0; the temperature is above 0."""
    scores = _penalised(logits, sampling, seen).double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = scores.softmax(dim=-1)
    if sampling.top_p == 1:
        return shares
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    excluded = before >= sampling.top_p
    excluded[:, 0] = False
    shares = shares.masked_fill(excluded.scatter(1, order, excluded), 0)
    return shares / shares.sum(dim=-1, keepdim=True)


def _penalised(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    if seen is None or sampling.repetition_penalty == 1:
        return logits
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
