"""What a model that knows only how frequent each token is would score: the floor a run must beat."""

from collections.abc import Mapping

import numpy as np

from stablelm.data.encoding import Encoder
from stablelm.data.storage.options import ReadOptions
from stablelm.data.training import token_arrays
from stablelm.data.validation import ValidationSet


def cross_entropy(
    train: Mapping[str, list[str]],
    tokenizer: Encoder,
    validation: ValidationSet,
    *,
    vocab: int,
    tokens: int,
    options: ReadOptions,
    shares: Mapping[str, float] | None = None,
) -> float:
    """Mean cross-entropy, in nats a token, of an add-one unigram model on the validation targets.

    The model is p(v) = (count(v) + 1) / (N + vocab) over the first N = `tokens` training tokens (files in
    base-name order, documents in file order, eos counted; fewer if there are fewer), of several sources each its share
    of `shares`. Raises DataError.
    """
    counts = np.ones(vocab, np.int64)
    for name, files in train.items():
        left = tokens if shares is None else round(tokens * shares[name])
        for tokens_of_some in token_arrays(files, tokenizer, options=options):
            if left <= 0:
                break
            ids = tokens_of_some[:left]
            counts += np.bincount(ids, minlength=vocab)
            left -= len(ids)
    targets = validation.targets.numpy()
    log_probability = np.log(counts) - np.log(counts.sum())
    return float(-log_probability[targets[targets >= 0]].mean())
