"""tokenizer.json files of every form: the text comes back, batches equal single texts, special tokens stay apart."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tokenizer_files
from support.samples import shared_data
from support.tokenizer_files import AWKWARD, TEXT, changed

from stablelm.errors import ConfigError, DataError
from stablelm.tokenizers import Tokenizer, load_tokenizer
from stablelm.tokenizers.interface import document_tokens, restores

# Every character that UTF-8 can hold, and more often those that tokenizers treat apart.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \t\n'ts123<|>▁éé\x00"), max_size=60)
END = "<|endoftext|>"


def load(folder: Path, content: bytes, beside: dict | None = None, **options) -> Tokenizer:
    return load_tokenizer(tokenizer_files.write(folder, content, **(beside or {})), **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("made")
    return {
        "ours": load(folder / "ours", tokenizer_files.byte_level()),
        "gpt2": load(folder / "gpt2", tokenizer_files.gpt2()),
        "llama3": load(folder / "llama3", tokenizer_files.llama3(), add_bos=True),
        "unigram": load(folder / "unigram", tokenizer_files.unigram()),
    }


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3"])
@given(text=ANY_TEXT)
@settings(deadline=None, max_examples=60)
def test_byte_level_bpe_gives_every_text_back(made: dict[str, Tokenizer], name: str, text: str):
    tokenizer = made[name]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.eos, tokenizer.bos} & set(ids)
    assert tokenizer.decode([tokenizer.eos, *ids, tokenizer.eos]) == text
    assert not text or restores(tokenizer, document_tokens(tokenizer, text), text)


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3", "unigram"])
@given(texts=st.lists(ANY_TEXT, max_size=40), threads=st.sampled_from([1, 2, 5]))
@settings(deadline=None, max_examples=30)
def test_a_batch_is_its_texts_one_by_one(made: dict[str, Tokenizer], name: str, texts: list[str], threads: int):
    tokenizer = made[name]
    bos = [tokenizer.bos] if tokenizer.add_bos else []
    expected = [[*(bos if (ids := tokenizer.encode(text)) else ()), *ids, tokenizer.eos] for text in texts]
    found = tokenizer.encode_arrays(texts, threads=threads)
    assert [array.tolist() for array in found] == expected
    assert all(array.dtype == np.int32 for array in found)


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3", "unigram"])
def test_many_long_texts_are_the_same_for_every_number_of_threads(made: dict[str, Tokenizer], name: str):
    texts = [f"{AWKWARD}{number} {line} " * 40 for number in range(30) for line in TEXT[:3]]
    alone, *shared = (made[name].encode_arrays(texts, threads=threads) for threads in (1, 2, 3, 64))
    for found in shared:
        assert [array.tolist() for array in found] == [array.tolist() for array in alone]


@pytest.mark.parametrize(
    ("name", "pieces", "eos", "bos"),
    [("ours", 290, 0, None), ("gpt2", 301, 300, None), ("llama3", 304, 301, 300), ("unigram", None, 1, None)],
)
def test_sizes_count_added_tokens_and_ends_are_found(made, name: str, pieces: int | None, eos: int, bos: int | None):
    tokenizer = made[name]
    assert (tokenizer.eos, tokenizer.bos) == (eos, bos)
    assert pieces is None or tokenizer.pieces == pieces
    assert tokenizer.unknown == (2 if name == "unigram" else None)


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3", "unigram"])
def test_it_is_the_same_after_a_trip_to_another_process_or_through_its_files(made, name: str, tmp_path: Path):
    tokenizer: Tokenizer = made[name]
    for file, content in tokenizer.files().items():
        (tmp_path / file).write_bytes(content)
    for again in (pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(tmp_path, add_bos=tokenizer.add_bos)):
        assert again.sha256 == tokenizer.sha256
        assert document_tokens(again, AWKWARD).tolist() == document_tokens(tokenizer, AWKWARD).tolist()


LOOKALIKE = {"ours": END, "gpt2": END, "llama3": "<|end_of_text|>", "unigram": "</s>"}


@pytest.mark.parametrize("name", list(LOOKALIKE))
def test_text_that_looks_like_the_end_is_text(made: dict[str, Tokenizer], name: str):
    tokenizer, end = made[name], LOOKALIKE[name]
    for text in (end, f"a {end} b", f"the{end}{end} dog", f"{end}\n{end}"):
        ids = tokenizer.encode(text)
        assert ids and not {tokenizer.eos, tokenizer.bos} & set(ids)
        assert name == "unigram" or tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "change",
    [lambda d: d["added_tokens"][0].update(special=False), lambda d: d.update(added_tokens=[])],
    ids=["not special", "only in the vocabulary"],
)
def test_an_end_that_the_file_does_not_call_special_is_not_made_from_text(change, tmp_path: Path):
    tokenizer = load(tmp_path, changed(tokenizer_files.byte_level(), change), eos_token=END)
    ids = tokenizer.encode(f"a {END} b")
    assert tokenizer.eos == 0 and 0 not in ids
    assert tokenizer.decode([*ids, 0]) == f"a {END} b"


def test_truncation_padding_and_template_of_the_file_are_not_used(tmp_path: Path):
    def change(described: dict) -> None:
        described["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        described["padding"] = {
            "strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
            "pad_type_id": 0, "pad_token": END,
        }  # fmt: skip

    plain = load(tmp_path / "plain", tokenizer_files.llama3())
    cut = load(tmp_path / "cut", changed(tokenizer_files.llama3(), change))
    assert cut.encode(AWKWARD) == plain.encode(AWKWARD)
    assert plain.bos not in plain.encode(AWKWARD)


def test_documents_begin_with_bos_only_where_asked(tmp_path: Path):
    plain = load(tmp_path, tokenizer_files.llama3())
    begun = load(tmp_path, tokenizer_files.llama3(), add_bos=True)
    [without], [with_bos] = plain.encode_arrays(["a fox"]), begun.encode_arrays(["a fox"])
    assert with_bos.tolist() == [begun.bos, *without.tolist()]
    assert begun.encode_arrays(["", "x"])[0].tolist() == [begun.eos]
    assert plain.sha256 != begun.sha256


def test_the_hash_is_of_the_file_and_of_the_tokens_around_a_document(tmp_path: Path):
    content = tokenizer_files.llama3()
    other_end = {"eos_token": "<|eot_id|>"}
    hashes = [
        load(tmp_path / "a", content).sha256,
        load(tmp_path / "b", content).sha256,
        load(tmp_path / "c", content, {"tokenizer_config": {"bos_token": "<|eot_id|>"}}).sha256,
        load(tmp_path / "d", content, {"tokenizer_config": other_end}).sha256,
        load(tmp_path / "a", content, None, **other_end).sha256,
        load(tmp_path / "e", content + b"\n").sha256,
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    assert hashes[3] == hashes[4]
    assert len(set(hashes)) == 3


NAMED = {"content": "<|eot_id|>", "lstrip": False}


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"eos_token": NAMED, "bos_token": "<|begin_of_text|>"}},
        {"special_tokens_map": {"eos_token": "<|eot_id|>"}},
        {"tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [303, 301]}},
        {"tokenizer_config": {"eos_token": "<|eot_id|>"}, "generation_config": {"eos_token_id": 301}},
    ],
)
def test_files_beside_it_say_which_token_ends_a_document(beside: dict, tmp_path: Path):
    tokenizer = load(tmp_path / "a", tokenizer_files.llama3(), beside)
    assert (tokenizer.eos, tokenizer.bos) == (303, 300)
    kept = tmp_path / "kept"
    kept.mkdir()
    for file, content in tokenizer.files().items():
        (kept / file).write_bytes(content)
        assert content == (tmp_path / "a" / file).read_bytes()
    assert load_tokenizer(kept / "tokenizer.json").sha256 == tokenizer.sha256


def test_what_loses_text_says_so(tmp_path: Path):
    words = load(tmp_path / "words", tokenizer_files.word_piece(), eos_token="[SEP]")
    assert not restores(words, document_tokens(words, "The  Fox\n"), "The  Fox\n")
    for kind, text, kept in (
        ("NFC", "cafe\u0301", True),
        ("NFKC", "\ufb01ve  \u2165\n", True),
        ("Lowercase", "the fox", True),
        ("Lowercase", "The fox", False),
        ("StripAccents", "cafe\u0301", False),
    ):
        change = changed(tokenizer_files.gpt2(), lambda d, kind=kind: d.update(normalizer={"type": kind}))
        made = load(tmp_path / kind, change)
        assert restores(made, document_tokens(made, text), text) == kept


def test_spaces_that_sentencepiece_joins_are_no_loss_but_unknown_letters_are():
    t5 = load_tokenizer(shared_data("tokenizers/t5-32k-unigram.model"))
    for text, kept in (("two  spaces,\na line \u2026", True), ("a snowman ☃", False)):
        assert restores(t5, document_tokens(t5, text), text) == kept


BAD = {
    "unknown pre-tokenizer": (lambda d: d.update(pre_tokenizer={"type": "Foo"}), "its pre_tokenizer of type 'Foo'"),
    "unknown model": (lambda d: d["model"].update(type="Zoo"), "its model of type 'Zoo'"),
    "unknown normalizer": (lambda d: d.update(normalizer={"type": "Shout"}), "its normalizer of type 'Shout'"),
    "no model": (lambda d: d.pop("model"), "it has no section 'model'"),
    "merges": (lambda d: d["model"].update(merges=[["zz", "y"]]), "its model: Token `zz` out of vocabulary"),
    "pattern": (
        lambda d: d.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+"}, "behavior": "Isolated", "invert": False}
        ),
        "its pre_tokenizer: Oniguruma error",
    ),
    "taken id": (lambda d: d["added_tokens"][0].update(id=77), "the id 77 of the added token"),
    "large id": (lambda d: d["model"]["vocab"].update(zzz=2**31), "the largest id of"),
    "random": (lambda d: d["model"].update(dropout=0.1), "encodes at random (model.dropout is 0.1)"),
    "no end": (lambda d: d["added_tokens"].clear(), "does not say which token ends a document; set data.eos_token"),
    "grows": (
        lambda d: d.update(
            normalizer={
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
            }
        ),
        "its normalizers may make a text",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_a_file_that_cannot_be_used_is_one_sentence(name: str, tmp_path: Path):
    change, says = BAD[name]
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, changed(tokenizer_files.byte_level(), change))
    message = str(caught.value)
    assert message.startswith("data.tokenizer: ") and says in message and str(tmp_path) in message
    assert "\n" not in message and caught.value.exit_code == 78


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": 5}', b'{"a": 1, "a": 2}', b"{" * 100_000, b"\xff{"])
def test_a_broken_file_is_one_sentence(content: bytes, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: .*tokenizer\.json' is not a tokenizer that can be used"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("beside", "options", "says"),
    [
        ({}, {"eos_token": "<eos>"}, "data.eos_token='<eos>' is not a token of .*; set data.eos_token to one of its"),
        ({}, {"add_bos": True}, "data.add_bos=true: .* has no token that begins a document; leave it out"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, {}, "tokenizer_config.json names '</s>' as the eos token, which"),
        ({"generation_config": {"eos_token_id": 9999}}, {}, "generation_config.json names 9999 as the eos token"),
        ({"tokenizer_config": {"eos_token": 5}}, {}, r"tokenizer_config.json in .* is not a tokenizer's settings"),
        ({"special_tokens_map": [1]}, {}, r"special_tokens_map.json in .* is not a tokenizer's settings"),
        ({}, {"key": "--tokenizer", "add_bos": True}, "--add-bos: .* has no token that begins a document"),
    ],
)
def test_special_tokens_that_are_not_there(beside: dict, options: dict, says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, tokenizer_files.byte_level(), beside, **options)


def test_a_pattern_that_never_ends_is_an_error_of_the_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = load(tmp_path, changed(tokenizer_files.byte_level(), lambda d: d.update(pre_tokenizer=split)))
    with pytest.raises(DataError, match=r"cannot encode a document .*retry-limit"):
        tokenizer.encode("a" * 40 + "b")
    assert tokenizer.encode("short")
    capfd.readouterr()  # the library writes a trace
