"""How likely a model finds texts: the function `stablelm.score`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.evaluate.generation.loaded_model import LoadedModel
from stablelm.evaluate.tasks.choice_items import Request, before_a_document
from stablelm.evaluate.tasks.likelihood import Shapes, loglikelihoods
from stablelm.model.loss import TokenScores


@dataclass(frozen=True)
class TextScore:
    """`log_likelihood`: nats, the sum over the text's tokens; `tokens` and UTF-8 `bytes`: how many, without eos."""

    log_likelihood: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """nan for an empty text."""
        return -self.log_likelihood / math.log(2) / self.bytes if self.bytes else math.nan


def score(model: LoadedModel, texts: str | Sequence[str], *, batch_size: int = 8) -> list[TextScore]:
    """The log-likelihood of each text as a document of its own, as lm-evaluation-harness's rolling one has it.

    The first token is predicted from what comes before a document in training (bos or the end of another), and a text
    longer than the model takes is scored in windows, each token with at least half a window before it. Raises
    ConfigError.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    asked, tokenizer = [texts] if isinstance(texts, str) else list(texts), model.run.tokenizer
    before = (before_a_document(tokenizer),)
    requests = [Request(before, tuple(tokenizer.encode(text))) for text in asked]
    ranks = Ranks(0, 1, model.device, None, None)
    scored = [request for request in requests if request.continuation]
    shapes = Shapes(batch_size, Shapes.of(model.config).longest)
    found = iter(loglikelihoods(_Module(model.module, model.device), ranks, scored, shapes))
    return [
        TextScore(
            next(found).log_probability if request.continuation else 0.0,
            len(request.continuation),
            len(text.encode()),
        )
        for text, request in zip(asked, requests, strict=True)
    ]


@dataclass(frozen=True)
class _Module:
    """What `loglikelihoods` asks of an engine."""

    module: nn.Module
    device: torch.device

    def scores(self, tokens: Tensor, places: Tensor, targets: Tensor) -> TokenScores:
        return self.module(tokens, targets, places=places)
