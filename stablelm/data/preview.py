"""What a run would read: statistics of its first documents, and its first sequences with their borders."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stablelm.config import rules
from stablelm.config.load import Loaded
from stablelm.config.schema import Config, DataConfig
from stablelm.data import inspection
from stablelm.data.corpus import configured_tokenizer
from stablelm.data.formats.file_rows import SharedFiles
from stablelm.data.loader import Batch, Loader
from stablelm.data.order import Order, ShardLane, TextLane
from stablelm.data.shards.shard_format import is_shard
from stablelm.data.shards.shard_reader import SharedShards
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError
from stablelm.printable import printable
from stablelm.tokenizers import Tokenizer
from stablelm.tokenizers.interface import count_unknown, document_tokens

LANES = 8  # from which documents are taken in turn
SHOWN = 3  # documents shown
SHOWN_CHARS = 400
FEWEST_ROWS = 32  # sequences from which the share of padding is taken
BORDER, EOS, PADDING = "◆", "⏹", "░"


@dataclass(frozen=True)
class DocumentStatistics:
    """Of some documents: lengths in tokens (eos counted), bytes of UTF-8 text a token, share of unknown tokens."""

    documents: int
    tokens: int
    mean: float
    median: float
    longest: int
    bytes_per_token: float
    unknown: float


def prepare(loaded: Loaded) -> tuple[Config, Tokenizer, inspection.Sources]:
    """The configuration, its tokenizer and its training files, all checked. Raises ConfigError."""
    config = loaded.config
    if config.train.steps is None and config.train.tokens is None:  # the text does not depend on them
        config = replace(config, train=replace(config.train, steps=1))
    rules.check(config, 1, None, loaded.origins)
    data = config.data
    tokenizer = configured_tokenizer(data)
    return config, tokenizer, inspection.find(data, tokenizer, tokens=data.seq_len + 1, lanes=data.lanes)


def preview(
    config: Config,
    tokenizer: Tokenizer,
    sources: inspection.Sources,
    *,
    documents: int,
    sequences: int,
    console: Console,
) -> None:
    """Prints the page. Raises DataError when text cannot be read."""
    if documents < 1 or sequences < 1:
        raise ConfigError("--documents and --sequences: nothing would be shown; give at least 1")
    files = [file for own in sources.values() for file in own]
    texts = list(itertools.islice(first_documents(files, tokenizer, config), documents))
    table = _table(f"first documents of {len(files)} file(s)", statistics(texts, tokenizer))
    each = Loader(
        sources,
        tokenizer,
        replace(config.data, workers=0),
        seed=config.run.seed,
        global_batch_size=sequences if config.data.packing == "split" else max(sequences, FEWEST_ROWS),
        documents=True,
    )
    batch = each.next()
    each.close()
    if config.data.packing == "best_fit":
        table.add_row("padding", f"{each.padding_share:.2%} of {len(batch.tokens)} sequences")
    console.print(table)
    for number, (_, text) in enumerate(texts[:SHOWN]):
        console.print(Text(f"\ndocument {number}", style="bold"))
        console.print(Text(printable(text[:SHOWN_CHARS]) + ("…" if len(text) > SHOWN_CHARS else "")))
    for row in range(sequences):
        console.print(Text(f"\nsequence {row}: {config.data.seq_len} tokens", style="bold"))
        console.print(page(batch, row, tokenizer))
    console.print(Text(f"\n{BORDER} a document begins   {EOS} it ends   {PADDING} padding", style="dim"))


def first_documents(files: list[str], tokenizer: Tokenizer, config: Config) -> Iterator[tuple[np.ndarray, str]]:
    """(tokens with eos, text) of documents in the order in which the first lanes of a run meet them."""
    data = config.data
    order = Order(files, seed=config.run.seed, lanes=data.lanes, shuffle_block=data.shuffle_block)
    lanes = [_documents(order, lane, tokenizer, data) for lane in range(min(LANES, data.lanes))]
    while True:
        for lane in lanes:
            yield next(lane)


def statistics(documents: list[tuple[np.ndarray, str]], tokenizer: Tokenizer) -> DocumentStatistics:
    """Of documents given as (tokens with eos, text)."""
    lengths = np.array([len(tokens) for tokens, _ in documents])
    size = sum(len(text.encode()) for _, text in documents)
    unknown = sum(count_unknown(tokenizer, tokens) for tokens, _ in documents)
    total = int(lengths.sum())
    return DocumentStatistics(
        len(lengths),
        total,
        float(lengths.mean()),
        float(np.median(lengths)),
        int(lengths.max()),
        size / total,
        unknown / total,
    )


def page(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    """A decoded sequence with its borders marked."""
    assert batch.documents is not None
    tokens, numbers = batch.tokens[row].numpy(), batch.documents[row].numpy()
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    shown = Text()
    for place, part in zip(starts, np.split(tokens, starts[1:]), strict=True):
        if place and (part == tokenizer.eos).all() and place + len(part) == len(tokens) and len(part) > 1:
            shown.append(f" {PADDING}{len(part)}", style="dim")
            continue
        shown.append(BORDER if place else "", style="bold magenta")
        shown.append(printable(tokenizer.decode(part.tolist())))
        if part[-1] == tokenizer.eos:
            shown.append(EOS, style="bold magenta")
    return shown


def _documents(order: Order, lane: int, tokenizer: Tokenizer, data: DataConfig) -> Iterator[tuple[np.ndarray, str]]:
    start, options = order.start(lane), ReadOptions.of(data, lanes=LANES)
    if all(map(is_shard, order.files)):
        shared = SharedShards(tokenizer.sha256, lanes=LANES, options=options)
        tokenized = ShardLane(order, lane, start, shared)
        while True:
            chunk = tokenized.next_chunk()
            for tokens in np.split(chunk.tokens, chunk.ends[:-1]):
                if len(tokens):
                    yield tokens, tokenizer.decode(tokens.tolist())
    files = SharedFiles(len(order.files), options=options)
    for _, text in TextLane(order, lane, start, files, options=options).documents():
        tokens = document_tokens(tokenizer, text)
        if len(tokens):
            yield tokens, text


def _table(title: str, found: DocumentStatistics) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in {
        "documents": f"{found.documents:,}",
        "tokens, eos counted": f"{found.tokens:,}",
        "a document, mean": f"{found.mean:,.1f} tokens",
        "a document, median": f"{found.median:,.1f} tokens",
        "the longest document": f"{found.longest:,} tokens",
        "bytes per token": f"{found.bytes_per_token:.3f}",
        "unknown tokens": f"{found.unknown:.4%}",
    }.items():
        table.add_row(name, value)
    return table
