"""Tokenizes text into shards, once for many runs: `stablelm prepare --source ... --tokenizer ... --out DIR`."""

import argparse
import os

from stablelm.command_names import typed
from stablelm.errors import ConfigError
from stablelm.programs.arguments import Parser, add_text_arguments, path_or_url, run

DESCRIPTION = """Tokenizes any text that stablelm reads into shards, once for many runs.

    %(prog)s --source 'c4/en/c4-train.*.json.gz' --tokenizer c4-32k.model --out c4-shards
    {pretrain} --config FILE data.source=shards data.path=c4-shards data.tokenizer=c4-32k.model

One shard a source file, with the same documents in the same order: a run may change over in the middle. Run again
after an interruption; finished shards are kept. On several machines give each its --part, then run once without.
"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    description = DESCRIPTION.format(pretrain=typed("pretrain"))
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        type=path_or_url,
        help="a SentencePiece .model file, a tokenizer.json, a folder with one, a model on the hub, or 'embedded'",
    )
    parser.add_argument("--add-bos", action="store_true", help="begin each document with the tokenizer's bos token")
    parser.add_argument("--eos-token", metavar="TOKEN", help="the token that ends documents; default: the tokenizer's")
    parser.add_argument(
        "--out", required=True, type=path_or_url, help="folder or URL (s3://, gs://, az://) for the shards"
    )
    parser.add_argument("--workers", type=int, help="processes, each with a file at a time; default: one a core")
    parser.add_argument("--part", metavar="K/N", help="only the K-th of N shares of the files, and no manifest")
    parser.add_argument("--min-chars", type=int, metavar="N", help="exclude shorter documents; default: none")
    parser.add_argument("--max-chars", type=int, metavar="N", help="exclude longer documents; default: none")
    parser.add_argument(
        "--dedup",
        choices=["exact", "minhash"],
        help="exclude copies of earlier documents, or near copies; default: none",
    )
    parser.add_argument(
        "--similarity", type=float, default=0.8, help="of near copies: share of common five-word runs; default: 0.8"
    )
    parser.add_argument("--verify", action="store_true", help="hash finished shards in a store before keeping them")
    parser.add_argument(
        "--retry-budget", type=float, default=600.0, help="seconds to retry one unreachable read; default: 600"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    return run(lambda: _prepare(options))


def _prepare(options: argparse.Namespace) -> None:
    # Imported here, so that --help answers at once.
    from stablelm.data import inspection
    from stablelm.data.embedded import embedded
    from stablelm.data.prepare_shards import PrepareRequest, prepare
    from stablelm.data.shards import row_filters
    from stablelm.data.shards.shard_format import OutputFolder
    from stablelm.data.storage.options import ReadOptions
    from stablelm.tokenizers import load_tokenizer

    workers = options.workers if options.workers is not None else _cores()
    if workers < 1:
        raise ConfigError(f"--workers: must be at least 1, not {workers}")
    filters = row_filters.RowFilters(options.min_chars, options.max_chars, options.dedup, options.similarity)
    row_filters.check(filters)
    part = _part(options.part)
    path = embedded(options.cache).tokenizer if options.tokenizer == "embedded" else options.tokenizer
    tokenizer = load_tokenizer(path, key="--tokenizer", add_bos=options.add_bos, eos_token=options.eos_token)
    reading = ReadOptions(
        retry_budget=options.retry_budget,
        text_column=options.text_column,
        bad_rows=options.bad_rows,
        text_unit=options.text_unit,
    )
    files = inspection.text_files(options.source, key="--source", cache=options.cache, options=reading)
    out = OutputFolder(options.out)
    out.create("--out")
    request = PrepareRequest(files, tokenizer, out, filters, workers, part, options.verify, reading)
    prepare(request, lambda text: print(text, flush=True))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    share, _, shares = text.partition("/")
    if share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares):
        return int(share), int(shares)
    raise ConfigError(f"--part: {text!r} is not K/N with 1 <= K <= N; write 3/16 for the third of sixteen")
