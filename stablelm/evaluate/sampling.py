"""The next token of each row from its logits: greedy, or drawn at a temperature from the likeliest tokens."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stablelm.errors import ConfigError
from stablelm.seeds import seed_from


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and when it ends. Raises ConfigError for values that mean nothing.

    `temperature`: divides the logits, 0 takes the likeliest token; `top_k`: only so many likeliest tokens, 0: all;
    `top_p`: only the likeliest tokens that together have this probability (Holtzman et al., ICLR 2020), at least one;
    `repetition_penalty`: logits of tokens that the prompt or the text has are divided by it if positive, else
    multiplied (Keskar et al. 2019, CTRL). `stop`: strings before which the text ends.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0; 0 takes the likeliest token"),
            ("top_k", self.top_k >= 0, "at least 0; 0 takes all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"),
            ("stop", "" not in self.stop, "strings that are not empty"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        )
        wrong = [f"{name}={getattr(self, name)} must be {words}" for name, holds, words in checks if not holds]
        if wrong:
            raise ConfigError("\n".join(wrong))


def uniforms(seed: int, prompt: list[int], number: int) -> np.random.Generator:
    """What draws the tokens of a prompt's sample number `number`, whatever else is in the batch or in the call."""
    return np.random.Generator(np.random.PCG64(seed_from("sample", seed, *prompt, number)))


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
