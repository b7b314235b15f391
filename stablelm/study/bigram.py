"""The bigram model that a run must beat to say anything of depth: interpolated Kneser-Ney, from the run's own tokens.

Chen and Goodman 1999 (An empirical study of smoothing techniques), section 3.4, one discount an order:
p(b | a) = max(c(a b) - D, 0) / c(a .) + D N(a .) / c(a .) q(b), where N(a .) counts the tokens seen after a, q(b) is
proportional to the number of different tokens seen before b, less a discount that goes to the uniform distribution in
the same way, and D = n1 / (n1 + 2 n2) from the numbers of pairs seen once and twice.
"""

from collections.abc import Iterator

import numpy as np

from stablelm.config.schema import Config
from stablelm.data.inspection import Sources
from stablelm.data.loader import Loader
from stablelm.data.validation import ValidationSet
from stablelm.model.targets import IGNORED
from stablelm.tokenizers import Tokenizer

Pairs = tuple[np.ndarray, np.ndarray]


class Bigram:
    """Counts of pairs, and the loss of the model that they make."""

    def __init__(self, vocab: int):
        self._vocab = vocab
        self._codes, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def count(self, first: np.ndarray, second: np.ndarray) -> None:
        """Adds pairs of neighbouring tokens, two int arrays of one shape."""
        codes, counts = np.unique(first.astype(np.int64).ravel() * self._vocab + second.ravel(), return_counts=True)
        both = np.concatenate([self._codes, codes])
        self._codes, place = np.unique(both, return_inverse=True)
        self._counts = np.bincount(place, np.concatenate([self._counts, counts]), len(self._codes)).astype(np.int64)

    def loss(self, first: np.ndarray, second: np.ndarray) -> float:
        """Mean -ln p(second | first), nats."""
        before, after = np.divmod(self._codes, self._vocab)
        seen = np.bincount(before, self._counts, self._vocab)
        kinds = np.bincount(before, minlength=self._vocab)
        lower = self._lower(np.bincount(after, minlength=self._vocab))
        discount = _discount(self._counts)
        first, second = first.astype(np.int64).ravel(), second.astype(np.int64).ravel()
        codes = first * self._vocab + second
        place = np.minimum(np.searchsorted(self._codes, codes), max(len(self._codes) - 1, 0))
        found = np.where(self._codes[place] == codes, self._counts[place], 0)
        known = seen[first] > 0
        total = np.where(known, seen[first], 1)
        own = np.maximum(found - discount, 0) / total
        rest = np.where(known, discount * kinds[first] / total, 1.0)
        return float(-np.log(own + rest * lower[second]).mean())

    def _lower(self, kinds: np.ndarray) -> np.ndarray:
        """q: by the number of different tokens before each token, (vocab,)."""
        discount, total = _discount(kinds[kinds > 0]), kinds.sum()
        uniform = discount * np.count_nonzero(kinds) / total / self._vocab
        return np.maximum(kinds - discount, 0) / total + uniform


def _discount(counts: np.ndarray) -> float:
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    # With no pair seen once nothing would be left for pairs that were not seen.
    return once / (once + 2 * twice) if once else 0.5


def training_pairs(config: Config, files: Sources, tokenizer: Tokenizer, seed: int) -> Iterator[Pairs]:
    """Inputs and targets of every batch that a run with that seed trains on."""
    loader = Loader(files, tokenizer, config.data, seed=seed, global_batch_size=config.train.global_batch_size)
    try:
        for _ in range(config.train.steps or 0):
            batch = loader.next()
            yield valid_pairs(batch.tokens.numpy(), batch.targets.numpy())
    finally:
        loader.close()


def valid_pairs(tokens: np.ndarray, targets: np.ndarray) -> Pairs:
    """Those whose target counts."""
    valid = targets != IGNORED
    return tokens[valid], targets[valid]


def bigram_loss(config: Config, files: Sources, tokenizer: Tokenizer, validation: ValidationSet, seed: int) -> float:
    """Of the model counted on a run's training tokens, on its validation windows. Raises DataError."""
    model = Bigram(tokenizer.pieces)
    for first, second in training_pairs(config, files, tokenizer, seed):
        model.count(first, second)
    return model.loss(*valid_pairs(validation.tokens.numpy(), validation.targets.numpy()))
