"""Multiple-choice items of a local JSON-lines file: read with bounds, checked, and turned into tokens (torch-free).

A line holds `query`, `choices` and `gold`, the place of the right choice from 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from stablelm.errors import ConfigError
from stablelm.json_text import Count, parse
from stablelm.small_files import open_regular
from stablelm.tokenizers.interface import Tokenizer

SUFFIX = ".jsonl"
LINE_BYTES = 1 << 20
MOST_ITEMS = 1_000_000
DELIMITER = " "
"""Between query and choice, as in lm-evaluation-harness."""
FORM = 'give {"query": "...", "choices": ["...", "..."], "gold": 0} on each line, gold counted from 0'


class Item(TypedDict):
    """One line of the file; other keys are ignored."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    query: str
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2, max_length=1000)]
    gold: Count


class Request(NamedTuple):
    """Tokens to score after others; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class ChoiceTask:
    """Items as tokens: of each its requests, one for each choice, the lengths of these in characters, and the gold."""

    requests: list[list[Request]]
    lengths: list[list[int]]
    gold: list[int]
    shortened: int
    """Requests that are longer than a sequence, so that not all of their text is seen at once."""


def read_task(path: str, tokenizer: Tokenizer, *, longest: int, items: int | None = None, key: str) -> ChoiceTask:
    """The first `items` (None: all) of a file. `longest`: tokens of the longest sequence that the model takes.

    Raises ConfigError under `key`, with the number of the line where one is wrong.
    """
    found: list[tuple[list[Request], list[int], int]] = []
    for item in islice(_items(path, key), items):
        requests = [encode_pair(tokenizer, item["query"], DELIMITER + choice) for choice in item["choices"]]
        found.append((requests, [len(choice) for choice in item["choices"]], item["gold"]))
    if not found:
        raise ConfigError(f"{key}: {path} holds no item; {FORM}")
    requests, lengths, gold = (list(part) for part in zip(*found, strict=True))
    shortened = sum(len(one.context) + len(one.continuation) > longest + 1 for each in requests for one in each)
    return ChoiceTask(requests, lengths, gold, shortened)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokens of a text, cut where the continuation begins.

    The rule of lm-evaluation-harness (`TemplateLM._encode_pair` and `loglikelihood`), so that figures agree: white
    space at the end of the context belongs to the continuation, and an empty context is the end of a document. Where
    the cut lies inside the last token, that token is the continuation.
    """
    stripped, first = context.rstrip(), before_a_document(tokenizer)
    continuation, context = context[len(stripped) :] + continuation, stripped
    tokens = tokenizer.encode(context + continuation)
    if not context:
        tokens = tokens if tokens and tokens[0] == first else [first, *tokens]
        cut = 1
    elif len(tokens) < 2:  # a single token for everything
        tokens, cut = [first, *tokens], 1
    else:
        cut = max(1, min(len(tokenizer.encode(context)), len(tokens) - 1))
        if tokenizer.add_bos:
            tokens, cut = [first, *tokens], cut + 1
    return Request(tuple(tokens[:cut]), tuple(tokens[cut:]))


def before_a_document(tokenizer: Tokenizer) -> int:
    """The token after which a document's text comes in training: its own bos, or the end of the one before."""
    return tokenizer.bos if tokenizer.add_bos and tokenizer.bos is not None else tokenizer.eos


def _items(path: str, key: str) -> Iterator[Item]:
    try:
        with open(open_regular(Path(path).expanduser()), "rb") as file:
            for number in range(1, MOST_ITEMS + 1):
                line = file.readline(LINE_BYTES + 1)
                if not line:
                    return
                if line.strip():
                    yield _item(line, f"{key}: {path}:{number}")
        raise ConfigError(f"{key}: {path} has more than {MOST_ITEMS} lines; give a smaller file")
    except OSError as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ConfigError(f"{key}: {path} {why}; give a local {SUFFIX} file of multiple-choice items") from None


def _item(line: bytes, where: str) -> Item:
    if len(line) > LINE_BYTES:
        raise ConfigError(f"{where}: the line is longer than {LINE_BYTES >> 20} MiB; {FORM}")
    try:
        item = parse(line, Item)
    except ValueError as error:
        raise ConfigError(f"{where}: not a multiple-choice item ({error}); {FORM}") from None
    if item["gold"] >= len(item["choices"]):
        raise ConfigError(
            f"{where}: gold is {item['gold']}, but there are {len(item['choices'])} choices, counted from 0; {FORM}"
        )
    return item
