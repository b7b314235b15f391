"""The text of tokens that arrive one at a time: whole characters only, and nothing that a stop string may yet take."""

from collections.abc import Iterable, Sequence
from typing import Protocol

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8
"""Tokens of the prompt before the first new one: what a token adds to a text depends on those before it."""
MOST_PENDING = 16
"""A character is four bytes at most; so many tokens that end within one are bytes that make none."""


class Decoding(Protocol):
    """What a text needs of a tokenizer."""

    def decode(self, ids: Iterable[int]) -> str: ...


class GrowingText:
    """The continuation of a prompt. `text` is what is certain; a stop string and what follows it are left out."""

    def __init__(self, tokenizer: Decoding, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._window = list(prompt[-CONTEXT:])
        self._read = len(self._window)
        self._decoded = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What the text grows by with one more token; '' while a character or a stop string may still go on."""
        self._window.append(token)
        new, broken = self._new()
        pending = len(self._window) - self._read
        if broken and pending < MOST_PENDING:
            return ""
        if new:
            self._window = self._window[self._read :]
        self._read = len(self._window)
        return self._grow(new, ended=False)

    def end(self) -> str:
        """What the text grows by when no token follows."""
        new, _ = self._new()
        return self._grow(new, ended=True)

    def _new(self) -> tuple[str, bool]:
        """The text of the tokens that were not read yet, and whether it ends within a character."""
        known, everything = (self._tokenizer.decode(self._window[:end]) for end in (self._read, len(self._window)))
        return everything[len(known) :], everything.endswith(BROKEN)

    def _grow(self, new: str, *, ended: bool) -> str:
        if self.stopped:
            return ""
        self._decoded += new
        certain = len(self._decoded)
        # Nothing before what is certain can be part of a stop string.
        found = [at for at in (self._decoded.find(each, len(self.text)) for each in self._stop) if at >= 0]
        if found:
            certain, self.stopped = min(found), True
        elif not ended:
            certain -= max((_overlap(self._decoded, each) for each in self._stop), default=0)
        grown = self._decoded[len(self.text) : certain]
        self.text += grown
        return grown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text with which the stop string begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
