"""Trains a tokenizer on any text: `stablelm train-tokenizer --source ... --vocab-size N --out FILE`."""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stablelm.errors import ConfigError
from stablelm.programs.arguments import Parser, add_text_arguments, path_or_url, run

DESCRIPTION = """Trains a tokenizer on any text that stablelm reads: a SentencePiece model or byte-level BPE.

    %(prog)s --source embedded --vocab-size 4096 --out tokenizer.model
    %(prog)s --source 'c4/en/c4-train.0000*.json.gz' --vocab-size 32000 --out c4-32k.model
    %(prog)s --kind bpe-bytes --source embedded --vocab-size 4096 --out tokenizer.json

The same text and options give the same file. decode(encode(text)) reproduces every text.
"""
HELD_OUT_SHARE = 100  # every hundredth document, by the hash of its text, is kept for the report
HELD_OUT = 1000  # documents held out at most


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument(
        "--kind",
        choices=["sentencepiece", "bpe-bytes"],
        default="sentencepiece",
        help="a .model file, or byte-level BPE as GPT-2 has it, a tokenizer.json; default: sentencepiece",
    )
    parser.add_argument("--out", required=True, type=path_or_url, help="the .model or .json file to write")
    parser.add_argument("--vocab-size", type=int, required=True, help="pieces; 256 bytes, unknown and eos are included")
    parser.add_argument("--model-type", choices=["unigram", "bpe"], help="of sentencepiece; default: unigram")
    parser.add_argument(
        "--sentences", type=int, default=500_000, help="lines to train on, drawn from all the text; default: 500000"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw; default: 0")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    return run(lambda: _train(options))


def _train(options: argparse.Namespace) -> None:
    # Imported here, so that --help answers at once.
    from stablelm.data import inspection
    from stablelm.data.formats.file_rows import documents
    from stablelm.data.storage.options import ReadOptions
    from stablelm.tokenizers import load_tokenizer
    from stablelm.tokenizers.training import sample_lines, train, train_byte_level

    if options.sentences < 1:
        raise ConfigError(f"--sentences: must be at least 1, not {options.sentences}")
    in_bytes = options.kind == "bpe-bytes"
    if in_bytes and options.model_type:
        raise ConfigError(f"--model-type: {options.model_type} is a kind of SentencePiece model; leave it out")
    if options.out.endswith(".json") != in_bytes:
        name = "a name that ends in .json" if in_bytes else "another name, such as tokenizer.model"
        raise ConfigError(f"--out: {options.out!r} is not how a {options.kind} file is named; give {name}")
    reading = ReadOptions(text_column=options.text_column, bad_rows=options.bad_rows, text_unit=options.text_unit)
    files = inspection.text_files(options.source, key="--source", cache=options.cache, options=reading)
    held_out: list[str] = []

    def training_texts() -> Iterator[str]:
        for text in documents(files, reading):
            if len(held_out) < HELD_OUT and _number(text) % HELD_OUT_SHARE == 0:
                held_out.append(text)
            else:
                yield text

    lines = sample_lines(training_texts(), options.sentences, options.seed, ends=in_bytes)
    size, key = options.vocab_size, "--vocab-size"
    if in_bytes:
        content = train_byte_level(lines, vocab_size=size, key=key)
    else:
        content = train(lines, vocab_size=size, model_type=options.model_type or "unigram", key=key)
    write(Path(options.out), content)
    tokenizer = load_tokenizer(options.out, key="--out")
    print(f"{options.out}: {tokenizer.pieces} pieces, trained on {len(lines)} lines, sha256 {tokenizer.sha256}")
    if held_out:
        tokens = sum(len(tokenizer.encode(text)) for text in held_out)
        size = sum(len(text.encode()) for text in held_out)
        print(f"{size / max(tokens, 1):.3f} bytes per token on {len(held_out)} held-out documents ({size} bytes)")


def write(path: Path, content: bytes) -> None:
    """Atomic: `path` holds all of `content` or what it held before."""
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            staging = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staging.chmod(0o644)
        os.replace(staging, path)
    except OSError as error:
        if staging is not None:
            staging.unlink(missing_ok=True)
        fix = "give a path in a folder that can be written"
        raise ConfigError(f"--out: cannot write {str(path)!r} ({error.strerror}); {fix}") from None


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
