"""What a model that knows only how frequent each token is would score: the floor a run must beat."""

import numpy as np

from stablelm.data.encoding import Encoder, document_tokens
from stablelm.data.source import documents
from stablelm.data.validation import ValidationSet


def cross_entropy(
    train_files: list[str],
    tokenizer: Encoder,
    validation: ValidationSet,
    *,
    vocab: int,
    tokens: int,
    retry_budget: float,
) -> float:
    """Mean cross-entropy, in nats a token, of an add-one unigram model on the validation targets.

    The model is p(v) = (count(v) + 1) / (N + vocab) over the first N = `tokens` training tokens (files in
    base-name order, documents in file order, eos counted; fewer if there are fewer). Raises DataError.
    """
    counts = np.ones(vocab, np.int64)
    left = tokens
    for text in documents(train_files, retry_budget=retry_budget):
        if left <= 0:
            break
        ids = document_tokens(tokenizer, text)[:left]
        counts += np.bincount(ids, minlength=vocab)
        left -= len(ids)
    targets = validation.targets.numpy()
    log_probability = np.log(counts) - np.log(counts.sum())
    return float(-log_probability[targets[targets >= 0]].mean())
