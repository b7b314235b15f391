"""Texts that a model writes after prompts, several rows at a time, each as if it were alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.evaluate.generation.growing_text import GrowingText
from stablelm.evaluate.generation.next_token import choose
from stablelm.evaluate.generation.prompts import Prompt
from stablelm.evaluate.generation.sampling import Sampling, check_counts, uniforms
from stablelm.methods import catalogue
from stablelm.model.attention.cache import KeyValueCache
from stablelm.tokenizers.interface import Tokenizer

Forward = Callable[[Tensor, Tensor, KeyValueCache | None], Tensor]
"""(tokens (rows, new), a column of each row, cache) -> the logits there, (rows, vocab)."""


@dataclass(frozen=True)
class Continuation:
    """`text`: without the prompt, the end token and the stop string. `tokens`: all new ones, the end token too.

    `ended`: "eos", "stop" (a stop string) or "length".
    """

    text: str
    tokens: list[int]
    ended: str


@dataclass(frozen=True)
class Language:
    """A model that can be asked for logits, and the tokenizer it was trained with."""

    forward: Forward
    config: ModelConfig
    tokenizer: Tokenizer
    device: torch.device


@dataclass(frozen=True)
class Watcher:
    """What happens between tokens. `agree` gives the tokens that are taken, the same on all ranks.

    `reached` is called before each pass with its place, and may raise; `grown` with a prompt's index and new text.
    """

    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens
    reached: Callable[[str], None] = lambda place: None
    grown: Callable[[int, str], None] = lambda index, text: None


@torch.no_grad()
def continue_prompts(
    language: Language,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    watcher: Watcher | None = None,
) -> list[Continuation]:
    """A continuation of each prompt, in their order, `batch_size` rows at a time.

    What a row gets depends on its prompt, its number and the seed alone, up to the rounding of the products.
    """
    check_counts(batch_size=batch_size)
    watcher = watcher or Watcher()
    # Rows of a batch of about the same length, and samples of one prompt together.
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].tokens), prompts[index].tokens, index))
    found: dict[int, Continuation] = {}
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        rows = [_GrowingText(index, prompts[index], language.tokenizer, sampling) for index in chosen]
        place = f"prompts {first + 1} to {first + len(rows)} of {len(order)}"
        _write(language, rows, sampling, watcher, place)
        found |= {row.index: Continuation(row.text.text, row.tokens, row.ended) for row in rows}
    return [found[index] for index in range(len(prompts))]


@dataclass
class _GrowingText:
    """A continuation that is being written."""

    index: int
    prompt: Prompt
    tokenizer: Tokenizer
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)
    ended: str = ""
    text: GrowingText = field(init=False)
    drawn: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.text = GrowingText(self.tokenizer, self.prompt.tokens, self.sampling.stop)
        self.drawn = uniforms(self.sampling.seed, self.prompt.tokens, self.prompt.number)

    def add(self, token: int) -> str:
        """Takes one more token; what the text grows by."""
        self.tokens.append(token)
        if token == self.tokenizer.eos:
            self.ended = "eos"
            return self.text.end()
        grown = self.text.add(token)
        if len(self.tokens) == self.sampling.max_new_tokens and not self.text.stopped:
            self.ended = "length"
            grown += self.text.end()
        if self.text.stopped:
            self.ended = "stop"
        return grown


def _write(language: Language, rows: list[_GrowingText], sampling: Sampling, watcher: Watcher, place: str) -> None:
    """Continues the rows of one batch to their ends."""
    watcher.reached(f"{place}, their tokens")
    context = _Context(language, rows, sampling)
    logits = context.begin()
    while True:
        drawn = [row.drawn.random() for row in rows]
        tokens = watcher.agree(choose(logits[:, : language.tokenizer.pieces], sampling, drawn, context.seen))
        for row, token in zip(rows, tokens, strict=True):
            grown = row.add(token)
            if grown:
                watcher.grown(row.index, grown)
        kept = [number for number, row in enumerate(rows) if not row.ended]
        if not kept:
            return
        if len(kept) < len(rows):
            rows, tokens = [rows[number] for number in kept], [tokens[number] for number in kept]
            context.select(kept)
        watcher.reached(f"{place}, new token {len(rows[0].tokens) + 1}")
        logits = context.extend([[token] for token in tokens])


class _Context:
    """What the rows' next tokens depend on: their keys and values, or all their tokens where these cannot be kept."""

    def __init__(self, language: Language, rows: Sequence[_GrowingText], sampling: Sampling):
        self._language = language
        self._prompts = [row.prompt.tokens for row in rows]
        self._tokens: list[list[int]] = []
        self._cache: KeyValueCache | None = None
        self._room = max(map(len, self._prompts)) + sampling.max_new_tokens
        self._penalised = sampling.repetition_penalty != 1
        self.seen: Tensor | None = None

    def begin(self) -> Tensor:
        """Reads the prompts, each of several equal ones once; logits (rows, vocab)."""
        distinct = list(dict.fromkeys(map(tuple, self._prompts)))
        if not catalogue.cache_obstacles(self._language.config):
            self._cache = KeyValueCache(self._language.config, len(distinct), reserve=self._room)
        self._tokens = [[] for _ in distinct]
        if self._penalised:
            shape = len(distinct), self._language.tokenizer.pieces
            self.seen = torch.zeros(shape, dtype=torch.bool, device=self._language.device)
        logits = self.extend([list(prompt) for prompt in distinct])
        copies = [distinct.index(tuple(prompt)) for prompt in self._prompts]
        if copies == list(range(len(distinct))):
            return logits
        self.select(copies)
        return logits[torch.tensor(copies, device=logits.device)]

    def extend(self, new: list[list[int]]) -> Tensor:
        """The logits after each row's new tokens."""
        if self.seen is not None:
            for row, tokens in zip(self.seen, new, strict=True):
                row[torch.tensor(tokens, device=row.device)] = True
        if self._cache is None:
            self._tokens = new = [[*old, *tokens] for old, tokens in zip(self._tokens, new, strict=True)]
            if len(set(map(len, new))) > 1:  # the length of a text may count, so none is filled up
                return torch.cat([self._logits([tokens]) for tokens in new])
        return self._logits(new)

    def _logits(self, new: list[list[int]]) -> Tensor:
        device, lengths = self._language.device, [len(tokens) for tokens in new]
        filled = [tokens + [0] * (max(lengths) - len(tokens)) for tokens in new]
        before = self._cache.lengths if self._cache is not None else []
        last = torch.tensor([length - 1 for length in lengths], device=device)
        logits = self._language.forward(torch.tensor(filled, device=device), last, self._cache)
        if self._cache is not None and len(set(lengths)) > 1:
            self._cache.keep([old + length for old, length in zip(before, lengths, strict=True)])
        return logits

    def select(self, rows: list[int]) -> None:
        """Goes on with these rows."""
        self._tokens = [self._tokens[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[torch.tensor(rows, device=self.seen.device)]
        if self._cache is not None:
            self._cache.select(rows)
