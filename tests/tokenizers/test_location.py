"""From a file or a folder to a tokenizer; both kinds keep one contract."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import tokenizer_files
from support.samples import shared_data
from support.tokenizer_files import AWKWARD, TEXT

from stablelm.errors import ConfigError
from stablelm.tokenizers import load_tokenizer
from stablelm.tokenizers.training import train


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(TEXT, vocab_size=300)


def test_a_folder_is_the_file_that_it_holds(model: bytes, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "spiece.model").write_bytes(model)
    (tmp_path / "a" / "README.md").write_text("words")
    assert load_tokenizer(tmp_path / "a").sha256 == load_tokenizer(tmp_path / "a" / "spiece.model").sha256
    folder = tokenizer_files.write(tmp_path / "b", tokenizer_files.gpt2(), generation_config={"eos_token_id": 5})
    assert load_tokenizer(folder).eos == load_tokenizer(folder / "tokenizer.json").eos == 5


def test_files_beside_one_with_another_name_are_not_its_own(tmp_path: Path):
    folder = tokenizer_files.write(tmp_path, tokenizer_files.gpt2(), generation_config={"eos_token_id": 5})
    (folder / "tokenizer.json").rename(folder / "mine.json")
    assert load_tokenizer(folder / "mine.json").eos == 300


def test_a_kind_is_known_by_its_content_too(model: bytes, tmp_path: Path):
    (tmp_path / "a").write_bytes(model)
    (tmp_path / "b").write_bytes(tokenizer_files.byte_level())
    assert [load_tokenizer(tmp_path / name).pieces for name in "ab"] == [300, 290]


@pytest.mark.parametrize("kind", ["sentencepiece", "hugging face"])
def test_several_threads_may_encode_at_once(kind: str, model: bytes, tmp_path: Path):
    (tmp_path / "a").write_bytes(model if kind == "sentencepiece" else tokenizer_files.gpt2())
    tokenizer = load_tokenizer(tmp_path / "a")
    texts = [f"{line} {number}" for number in range(100) for line in TEXT[:3]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [tokenizer.encode(text) for text in texts], range(4)))
    assert found == [[tokenizer.encode(text) for text in texts]] * 4


def test_folders_with_two_tokenizers_or_none(model: bytes, tmp_path: Path):
    folder = tokenizer_files.write(tmp_path / "two", tokenizer_files.gpt2())
    (folder / "tokenizer.model").write_bytes(model)
    says = r"^data\.tokenizer: .*two' holds tokenizer.json and tokenizer.model; name the one to use, such as '"
    with pytest.raises(ConfigError, match=says):
        load_tokenizer(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"^--tokenizer: .*none' holds no tokenizer; give a SentencePiece \.model"):
        load_tokenizer(tmp_path / "none", key="--tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "none" / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"holds vocab\.json and merges\.txt, but no tokenizer\.json; make one with"):
        load_tokenizer(tmp_path / "none")


def test_a_link_that_leads_nowhere_and_a_file_that_is_too_large(tmp_path: Path):
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"tokenizer\.json' does not exist"):
        load_tokenizer(tmp_path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(ConfigError, match=r"cannot read .*large\.json' \(larger than 64 MiB\)"):
        load_tokenizer(tmp_path / "large.json")


def test_sentencepiece_with_bos_and_another_end():
    path = shared_data("tokenizers/mistral-v1-32k-bpe.model")
    plain, begun = load_tokenizer(path), load_tokenizer(path, add_bos=True)
    other = load_tokenizer(path, eos_token="<s>")
    [ids], [with_bos], [ended] = (each.encode_arrays([AWKWARD]) for each in (plain, begun, other))
    assert with_bos.tolist() == [1, *ids.tolist()]
    assert ended.tolist() == [*ids.tolist()[:-1], 1] and other.eos == 1
    assert begun.encode_arrays([""])[0].tolist() == [2]
    assert len({plain.sha256, begun.sha256, other.sha256}) == 3
    # The model's own end, said again, is the same tokenizer.
    assert load_tokenizer(path, eos_token="</s>").sha256 == plain.sha256
    many = [AWKWARD, "one", ""] * 20
    assert [a.tolist() for a in begun.encode_arrays(many, threads=2)] == [
        begun.encode_arrays([text])[0].tolist() for text in many
    ]


def test_sentencepiece_ends_that_text_could_write_and_a_bos_that_is_not_there(model: bytes, tmp_path: Path):
    path = tmp_path / "a.model"
    path.write_bytes(model)
    with pytest.raises(ConfigError, match=r"^data\.eos_token='the' is not a control piece of .*; leave it out, or"):
        load_tokenizer(path, eos_token="the")
    with pytest.raises(ConfigError, match=r"^data\.add_bos=true: .*a\.model' has no token that begins a document"):
        load_tokenizer(path, add_bos=True)


def test_sentencepiece_goes_through_its_files(tmp_path: Path):
    path = shared_data("tokenizers/t5-32k-unigram.model")
    tokenizer = load_tokenizer(path)
    [(name, content)] = tokenizer.files().items()
    assert (name, content) == ("tokenizer.model", path.read_bytes())
    (tmp_path / name).write_bytes(content)
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


def test_real_web_text_is_the_same_in_batches_and_comes_back(tmp_path: Path):
    import gzip

    from stablelm.tokenizers.training import sample_lines, train_byte_level

    lines = gzip.decompress(shared_data("c4/en/c4-train.00000-of-00008.json.gz").read_bytes()).splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    content = train_byte_level(sample_lines(texts, 500, seed=0, ends=True), vocab_size=1000)
    tokenizer = load_tokenizer(tokenizer_files.write(tmp_path, content))
    found = tokenizer.encode_arrays(texts, threads=2)
    assert [array.tolist() for array in found] == [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
    assert all(tokenizer.decode(array.tolist()) == text for array, text in zip(found, texts, strict=True))
