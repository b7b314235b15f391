"""Documents of several lanes encoded in one call.

A tokenizer's tables fill the processor's cache; what is done between two calls drives them out, so a few hundred
documents at once cost a sixth less than some dozen at a time.
"""

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from stablelm.data.encoding import NO_TOKENS, Encoder, with_text
from stablelm.data.order import Chunk, Group

# Documents of one call, if the lanes have as many; those of a lane at its start, and at least afterwards.
TOGETHER = 512
FIRST, LEAST = 4, 8


@dataclass
class _Member:
    groups: Iterator[Group]
    ready: deque[Chunk | Exception]
    begun: bool = False


class Together:
    """Lanes whose windows are made by one thread. Each has at most one chunk that was not asked for yet.

    `turn` is that of all threads of the process: one encodes at a time, with the strength of `threads` of them, so
    that the others read meanwhile and the tokenizer's tables are in use once.
    """

    def __init__(self, encoder: Encoder, *, threads: int, turn: threading.Lock):
        self._encoder, self._threads, self._turn = encoder, threads, turn
        self._members: list[_Member] = []

    def counts(self) -> Iterator[int]:
        """How many documents a lane is to give in each of its groups."""
        yield FIRST
        while True:
            yield max(LEAST, TOGETHER // len(self._members))

    def chunks(self, groups: Iterator[Group]) -> Iterator[Chunk]:
        """The tokens of a lane's groups; raises what they raise."""
        member = _Member(groups, deque())
        self._members.append(member)
        return self._given(member, len(self._members) - 1)

    def _given(self, member: _Member, number: int) -> Iterator[Chunk]:
        while True:
            if not member.ready:
                self._fill(number)
            ready = member.ready.popleft()
            if isinstance(ready, Exception):
                raise ready
            yield ready

    def _fill(self, number: int) -> None:
        """Chunks for this lane and for those after it that have none left and need not open their first file."""
        self._members[number].begun = True
        taken: list[tuple[_Member, Group]] = []
        documents = 0
        for member in self._members[number:] + self._members[:number]:
            if member.ready or not member.begun:
                continue
            try:
                group = next(member.groups)
            except Exception as error:
                member.ready.append(error)
                continue
            taken.append((member, group))
            documents += len(group.texts)
            if documents >= TOGETHER:
                break
        texts = [text for _, group in taken for text in group.texts if text]
        with self._turn:
            tokens = iter(self._encoder.encode_arrays(texts, threads=self._threads) if texts else ())
        for member, group in taken:
            if group.texts:
                member.ready.append(chunk(group, tokens))
            if group.wrong is not None:
                member.ready.append(group.wrong)


def chunk(group: Group, tokens: Iterator[np.ndarray]) -> Chunk:
    """The chunk of a group, with the next `tokens` for each of its documents and none for rows without text."""
    parts = [with_text(next(tokens)) if text else NO_TOKENS for text in group.texts]
    ends = np.cumsum([len(part) for part in parts])
    return Chunk(group.cursor, np.concatenate(parts), ends, skipped=group.skipped)


def block_chunks(groups: Iterator[Group], encoder: Encoder) -> Iterator[Chunk]:
    """A chunk for each group, none of one with a mistake in it: half of it would be packed in another way."""
    for group in groups:
        if group.wrong is not None:
            raise group.wrong
        texts = [text for text in group.texts if text]
        yield chunk(group, iter(encoder.encode_arrays(texts) if texts else ()))
