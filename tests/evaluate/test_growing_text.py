"""Texts that grow by tokens: whole characters, the same as decoded at once, and stop strings across tokens."""

from collections.abc import Iterable, Sequence

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm.evaluate.generation.growing_text import GrowingText
from stablelm.tokenizers.training import train


class Bytes:
    """A token a byte, as a byte-level tokenizer falls back to."""

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def pieces() -> sentencepiece.SentencePieceProcessor:
    words = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "hat", "of", "the", "rat", "was", "flat"]
    lines = [" ".join([*words[i % 7 :], *words[: i % 5]]) for i in range(60)]
    return sentencepiece.SentencePieceProcessor(model_proto=train(lines, vocab_size=280))


def grown(tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    text = GrowingText(tokenizer, prompt, stop)
    parts = []
    for token in tokens:
        parts.append(text.add(token))
        if text.stopped:
            break
    else:
        parts.append(text.end())
    assert "".join(parts) == text.text
    return parts, text.stopped


def test_a_character_comes_with_its_last_byte():
    parts, _ = grown(Bytes(), b"ab", "né€🙂x".encode())
    assert parts == ["n", "", "é", "", "", "€", "", "", "", "🙂", "x", ""]


def test_what_ends_within_a_character_is_shown_at_the_end():
    assert grown(Bytes(), b"", "n€".encode()[:-1])[0] == ["n", "", "", "�"]


def test_bytes_that_never_make_a_character_do_not_hold_a_text_up():
    parts, _ = grown(Bytes(), b"a", [0xFF] * 40 + [65])
    assert any(parts[:-2])
    assert "".join(parts) == "�" * 40 + "A"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_parts_make_what_is_decoded_at_once(pieces: sentencepiece.SentencePieceProcessor, before: str, after: str):
    prompt, tokens = pieces.encode("the " + before), pieces.encode(after)
    whole, known = pieces.decode(prompt + tokens), pieces.decode(prompt)
    assert "".join(grown(pieces, prompt, tokens)[0]) == whole[len(known) :]


def test_a_space_before_the_first_new_word_stays(pieces: sentencepiece.SentencePieceProcessor):
    prompt, both = pieces.encode("the cat"), pieces.encode("the cat sat")
    assert both[: len(prompt)] == prompt
    assert "".join(grown(pieces, prompt, both[len(prompt) :])[0]) == " sat"


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", " t"], "one"),
        ("aab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("one", ["one"], ""),
        ("ein€zwei", ["€"], "ein"),
        ("one two", ["twox", "x"], "one two"),
    ],
)
def test_stop_strings_end_a_text_before_them(text: str, stop: list[str], kept: str):
    parts, stopped = grown(Bytes(), b"p", text.encode(), stop)
    assert "".join(parts) == kept
    assert stopped == (kept != text)


@settings(max_examples=200, deadline=None)
@given(st.text("ab€", max_size=20), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3))
def test_nothing_is_shown_that_a_stop_string_takes_back(text: str, stop: list[str]):
    wanted = text
    for end in range(1, len(text) + 1):
        if found := [text[:end].find(each) for each in stop if each in text[:end]]:
            wanted = text[: min(found)]
            break
    assert "".join(grown(Bytes(), b"p", text.encode(), stop)[0]) == wanted
