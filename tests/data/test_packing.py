"""Windows: a naive concatenation cut with an overlap of one token, from any cursor on."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.letters import LetterTokenizer, given_chunks

from stablelm.data.order import Cursor, TokenChunk
from stablelm.data.packing import Packer
from stablelm.tokenizers.interface import document_tokens

TEXTS = st.lists(st.text("abc", max_size=25), min_size=1, max_size=12).filter(any)


def cycle(texts: list[str], start: Cursor, together: int):
    """The texts again and again, so many of them in a chunk; the cursor's index counts them."""
    index = start.index
    while True:
        # As after a resume: the first chunk ends where one that began at 0 would.
        count = together - index % together
        parts = [document_tokens(LetterTokenizer(), texts[n % len(texts)]) for n in range(index, index + count)]
        yield TokenChunk(Cursor(0, 0, 0, index, 0), np.concatenate(parts), np.cumsum([len(part) for part in parts]))
        index += count


def pack(texts: list[str], seq_len: int, start: Cursor | None = None, together: int = 1) -> Packer:
    start = start or Cursor(0, 0, 0, 0, 0)
    return Packer(given_chunks(cycle(texts, start, together)), seq_len, start)


def concatenated(texts: list[str], length: int) -> list[int]:
    tokens = [[*map(ord, text), 0] for text in texts if text]
    return list(itertools.islice(itertools.chain.from_iterable(itertools.cycle(tokens)), length))


@settings(deadline=None)
@given(TEXTS, st.integers(1, 17), st.integers(1, 5))
def test_windows_are_the_concatenation_with_an_overlap_of_one(texts, seq_len, together):
    packer = pack(texts, seq_len, together=together)
    windows = [packer.next_window() for _ in range(9)]
    stream = concatenated(texts, 9 * seq_len + 1)
    for number, window in enumerate(windows):
        assert window.tolist() == stream[number * seq_len : (number + 1) * seq_len + 1]
    # Each token but the first is predicted once, each eos with it.
    predicted = np.concatenate([window[1:] for window in windows])
    assert predicted.tolist() == stream[1:]
    assert (predicted == 0).sum() == stream[1:].count(0)


@settings(deadline=None)
@given(TEXTS, st.integers(1, 17), st.integers(0, 6), st.integers(1, 4), st.integers(1, 5))
def test_the_cursor_is_all_the_state_however_documents_come(texts, seq_len, first, second, together):
    whole = pack(texts, seq_len)
    windows = [whole.next_window().tolist() for _ in range(first + second + 3)]
    part = pack(texts, seq_len, together=together)
    for number in range(first):
        assert part.next_window().tolist() == windows[number]
    part = pack(texts, seq_len, part.position.cursor(), together)
    for number in range(first, first + second):
        assert part.next_window().tolist() == windows[number]
    part = pack(texts, seq_len, Cursor(*part.position.cursor().to_list()))
    for number in range(first + second, first + second + 3):
        assert part.next_window().tolist() == windows[number]
    assert part.position.cursor() == whole.position.cursor()


def test_the_offset_counts_inputs_of_the_current_document():
    packer = pack(["abcdef", "gh"], 3)
    packer.next_window()
    assert packer.position.cursor() == Cursor(0, 0, 0, 0, 3)
    packer.next_window()
    assert packer.position.cursor() == Cursor(0, 0, 0, 0, 6), "eos of the first document is the next input"
    packer.next_window()
    assert packer.position.cursor() == Cursor(0, 0, 0, 1, 2)
    packer.next_window()
    assert packer.position.cursor() == Cursor(0, 0, 0, 2, 2)


def test_a_cursor_never_points_behind_a_document():
    packer = pack(["abc", "def"], 4)
    packer.next_window()
    assert packer.position.cursor() == Cursor(0, 0, 0, 1, 0)


@settings(deadline=None)
@given(TEXTS, st.integers(2, 17), st.integers(1, 5))
def test_borders_are_where_documents_begin(texts, seq_len, together):
    packer = pack(texts, seq_len, together=together)
    for _ in range(9):
        inputs = packer.next_window()[:-1]
        assert packer.borders.tolist() == [place + 1 for place, token in enumerate(inputs[:-1]) if token == 0]
        assert packer.filled == seq_len + 1


def test_an_empty_document_has_no_token():
    assert document_tokens(LetterTokenizer(), "").tolist() == []
    assert document_tokens(LetterTokenizer(), "a").dtype == np.int32
