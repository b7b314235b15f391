"""The documents of several lanes, tokenized in one call."""

import threading
from collections import deque
from collections.abc import Iterator

import numpy as np

from stablelm.data.order import DocumentGroup, TextLane, TokenChunk
from stablelm.tokenizers.interface import NO_TOKENS, Encoder, with_text

# Documents of one call, if the lanes have as many; those of a lane at its start, and at least afterwards.
DOCUMENTS_OF_A_CALL = 512
DOCUMENTS_AT_START, DOCUMENTS_AFTERWARDS = 4, 8


class BatchedTokenization:
    """The lanes of one thread, whose documents are tokenized in one call. Each has at most one chunk ahead.

    A tokenizer's tables fill the processor's cache; what is done between two calls drives them out, so a few hundred
    documents at once cost a sixth less than some dozen at a time. `turn` is that of all threads of the process: one
    encodes at a time, with `threads` threads, so that the others read meanwhile and the tables are in
    use once.
    """

    def __init__(self, encoder: Encoder, *, threads: int, turn: threading.Lock):
        self._encoder, self._threads, self._turn = encoder, threads, turn
        self._lanes: list[LaneTokens] = []

    def add(self, documents: TextLane) -> "LaneTokens":
        """The tokens of one more lane."""
        self._lanes.append(LaneTokens(documents, self, len(self._lanes)))
        return self._lanes[-1]

    def fill(self, number: int) -> None:
        """Makes chunks for lane `number` and for those after it that have none and need not open their first file."""
        each = max(DOCUMENTS_AFTERWARDS, DOCUMENTS_OF_A_CALL // len(self._lanes))
        taken: list[tuple[LaneTokens, DocumentGroup]] = []
        documents = 0
        for lane in self._lanes[number:] + self._lanes[:number]:
            if lane.ready or not lane.begun:
                continue
            try:
                group = lane.documents.next_group(DOCUMENTS_AT_START if lane.at_start else each)
            except Exception as error:
                lane.ready.append(error)
                continue
            lane.at_start = False
            taken.append((lane, group))
            documents += len(group.texts)
            if documents >= DOCUMENTS_OF_A_CALL:
                break
        texts = [text for _, group in taken for text in group.texts if text]
        with self._turn:
            tokens = iter(self._encoder.encode_arrays(texts, threads=self._threads) if texts else ())
        for lane, group in taken:
            if group.texts:
                lane.ready.append(_chunk(group, tokens))
            if group.wrong is not None:
                lane.ready.append(group.wrong)


class LaneTokens:
    """The tokens of one lane's documents, made with those of other lanes."""

    def __init__(self, documents: TextLane, batch: BatchedTokenization, number: int):
        self.documents, self._batch, self._number = documents, batch, number
        self.ready: deque[TokenChunk | Exception] = deque()
        self.begun, self.at_start = False, True

    def next_chunk(self) -> TokenChunk:
        """The tokens of the lane's next documents; raises what reading them raises."""
        self.begun = True
        if not self.ready:
            self._batch.fill(self._number)
        chunk = self.ready.popleft()
        if isinstance(chunk, Exception):
            raise chunk
        return chunk


class BlockTokens:
    """The tokens of one lane's documents, a whole block in each chunk, as best-fit packing needs them."""

    def __init__(self, documents: TextLane, encoder: Encoder):
        self._documents, self._encoder = documents, encoder

    def next_chunk(self) -> TokenChunk:
        """The tokens of the rest of the block. Raises what is wrong with any of its rows: none is left out."""
        group = self._documents.next_group()
        if group.wrong is not None:
            raise group.wrong
        texts = [text for text in group.texts if text]
        return _chunk(group, iter(self._encoder.encode_arrays(texts) if texts else ()))


def _chunk(group: DocumentGroup, tokens: Iterator[np.ndarray]) -> TokenChunk:
    """The chunk of a group, with the next `tokens` for each of its documents and none for rows without text."""
    parts = [with_text(next(tokens)) if text else NO_TOKENS for text in group.texts]
    ends = np.cumsum([len(part) for part in parts])
    return TokenChunk(group.cursor, np.concatenate(parts), ends, skipped=group.skipped)
