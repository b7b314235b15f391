"""The tokenizer's files of an export, for tokenizers of both kinds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from support import tokenizer_files as forms
from support.tiny import TinyCorpus, synthetic_documents

from stablelm.export import tokenizer_files
from stablelm.tokenizers import load_tokenizer


@dataclass
class ByteLevel:
    """A byte-level BPE from a tokenizer.json, as the data layer has it."""

    content: bytes
    settings: bytes | None = None
    eos: int = 0
    bos: int | None = None
    add_bos: bool = False
    unknown: int | None = None

    def files(self) -> dict[str, bytes]:
        found = {"tokenizer.json": self.content}
        return found if self.settings is None else {**found, "tokenizer_config.json": self.settings}

    def encode(self, text: str) -> list[int]:
        library = tokenizers.Tokenizer.from_str(self.content.decode())
        library.encode_special_tokens = True
        return library.encode(text, add_special_tokens=False).ids


def byte_level(**changes: Any) -> Any:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    library.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(synthetic_documents(20, seed=0), trainer)
    return ByteLevel(library.to_str().encode(), **changes)


def test_a_tokenizer_json_is_copied_and_gets_settings_for_transformers(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    own = byte_level()
    files = tokenizer_files.contents(own, longest=128)
    assert files["tokenizer.json"] == own.content
    assert tokenizer_files.token_ids(own) == (None, 0, 0)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.model_max_length) == (0, None, 128)
    for text in ("ban der <|end|> lim", "  Zwei\nWörter 🙂"):
        assert loaded(text)["input_ids"] == own.encode(text)
    assert tokenizer_files.difference(files, own, ["ban <|end|>", "é"]) == (0, 2)


def test_settings_that_the_tokenizer_has_stay():
    settings = json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>"}).encode()
    assert tokenizer_files.contents(byte_level(settings=settings), longest=8)["tokenizer_config.json"] == settings


def test_a_sentencepiece_model_is_copied_and_written_as_tokenizer_json(tiny_corpus: TinyCorpus):
    own = load_tokenizer(tiny_corpus.tokenizer)
    files = tokenizer_files.contents(own, longest=32)
    assert files["tokenizer.model"] == Path(tiny_corpus.tokenizer).read_bytes()
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["eos_token"] == "</s>"
    assert "chat_template" not in settings
    texts = synthetic_documents(5, seed=9)
    assert tokenizer_files.difference(files, own, texts) == (0, 5)


def test_documents_with_other_ids_are_counted(tiny_corpus: TinyCorpus):
    own = load_tokenizer(tiny_corpus.tokenizer)
    files = tokenizer_files.contents(own, longest=32)
    described = json.loads(files["tokenizer.json"])
    described["normalizer"] = None
    broken = {**files, "tokenizer.json": json.dumps(described).encode()}
    assert tokenizer_files.difference(broken, own, ["ban der", "fi"]).differing == 2


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("form", ["gpt2", "llama3"])
def test_texts_begin_as_in_training_whatever_the_file_puts_around_them(form: str, add_bos: bool, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer.json").write_bytes(getattr(forms, form)())
    bos = "<|endoftext|>" if form == "gpt2" else "<|begin_of_text|>"
    eos = "<|endoftext|>" if form == "gpt2" else "<|end_of_text|>"
    settings = {"bos_token": bos, "eos_token": eos, "tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    own = load_tokenizer(source, add_bos=add_bos)
    files = tokenizer_files.contents(own, longest=32)
    for name, content in files.items():
        (out / name).write_bytes(content)
    begin = [own.bos] if add_bos else []
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    assert loaded("the lazy dog")["input_ids"] == [*begin, *own.encode("the lazy dog")]
    assert tokenizer_files.difference(files, own, forms.TEXT[:3]) == (0, 3)
    same = add_bos == (form == "llama3")
    assert (files["tokenizer.json"] == own.files()["tokenizer.json"]) == same
