"""A small synthetic corpus in C4's own form, with a tokenizer trained on it: the same bytes every time."""

import gzip
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinyCorpus:
    """Paths as configuration keys take them."""

    folder: Path
    train: str
    validation: str
    tokenizer: str

    def overrides(self) -> list[str]:
        return [
            f"data.path={self.train}",
            f"data.validation_path={self.validation}",
            f"data.tokenizer={self.tokenizer}",
        ]


def write_documents(path: Path, documents: list[str]) -> Path:
    """A json.gz of C4's keys; reproducible bytes."""
    lines = [
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}"})
        for i, text in enumerate(documents)
    ]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream:
        stream.write("".join(line + "\n" for line in lines).encode())
    path.write_bytes(buffer.getvalue())
    return path


def synthetic_documents(count: int, seed: int) -> list[str]:
    """Text with structure to learn: Zipf-distributed words, each followed by one of a few."""
    words = [
        a + b for a in ["ba", "de", "fi", "go", "hu", "ka", "le", "mi"] for b in ("n", "r", "sta", "to", "", "lim")
    ]
    drawer = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(words))]
    documents = []
    for _ in range(count):
        word, text = drawer.choices(words, weights)[0], []
        for _ in range(drawer.randint(20, 120)):
            text.append(word)
            index = words.index(word)
            word = drawer.choice([words[(index * 7 + k) % len(words)] for k in (1, 2, 5)])
        documents.append(" ".join(text) + ".")
    return documents


def make_tiny_corpus(folder: Path, *, files: int = 4, documents: int = 60) -> TinyCorpus:
    """Writes `files` training files of `documents` each, one validation file and a tokenizer of up to 300 pieces."""
    import sentencepiece

    train = folder / "train"
    train.mkdir(parents=True)
    everything = []
    for index in range(files):
        texts = synthetic_documents(documents, seed=index)
        everything += texts
        write_documents(train / f"tiny-train.{index:05d}-of-{files:05d}.json.gz", texts)
    validation = write_documents(folder / "tiny-validation.json.gz", synthetic_documents(documents, seed=1000))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(everything),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        num_threads=1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = folder / "tiny.model"
    tokenizer.write_bytes(model.getvalue())
    return TinyCorpus(folder, str(train / "*.json.gz"), str(validation), str(tokenizer))
