"""A run begins from another's weights only where its tokens mean what they meant there."""

import json
from pathlib import Path

import pytest
from support import tokenizer_files
from support.programs import TINY, run
from support.tiny import TinyCorpus
from tokenizers import AddedToken, Tokenizer


def arguments(corpus: TinyCorpus, folder: Path, tokenizer: Path, *more: str) -> list[str]:
    text = (f"data.path={corpus.train}", f"data.validation_path={corpus.validation}", f"data.tokenizer={tokenizer}")
    return [*TINY, *text, "train.steps=1", f"run.dir={folder}", *more]


@pytest.fixture(scope="module")
def source(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a byte-level BPE."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "tokenizer.json").write_bytes(tokenizer_files.byte_level())
    done = run("pretrain", *arguments(tiny_corpus, folder / "run", folder / "tokenizer.json"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_another_tokenizer_is_refused_by_both_names(source: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    begun = f"run.init_from={source}"
    done = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", Path(tiny_corpus.tokenizer), begun))
    assert done.returncode == 78 and not (tmp_path / "run").exists()
    (sentence,) = done.stderr.splitlines()
    kept = source / "tokenizer.json"
    assert f"({kept}) than data.tokenizer={tiny_corpus.tokenizer}: " in sentence and "id 0 there" in sentence
    assert sentence.endswith(f"give {kept} by data.tokenizer")


def test_so_is_one_of_a_checkpoint_without_its_tokenizer(source: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    (tmp_path / "checkpoints").symlink_to(source / "checkpoints")
    begun = f"run.init_from={tmp_path / 'checkpoints' / 'step-00000001'}"
    done = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", Path(tiny_corpus.tokenizer), begun))
    assert done.returncode == 78 and not (tmp_path / "run").exists()
    assert "another tokenizer (with SHA-256" in done.stderr
    same = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", source / "tokenizer.json", begun))
    assert same.returncode == 0, same.stderr


def test_more_pieces_and_other_ends_of_documents_are_allowed(source: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    made = Tokenizer.from_file(str(source / "tokenizer.json"))
    made.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    more = ("data.eos_token='<|im_end|>'", "data.add_bos=true", f"run.init_from={source}")
    done = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", tmp_path / "tokenizer.json", *more))
    assert done.returncode == 0, done.stderr
