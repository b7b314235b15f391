"""Loss, perplexity and bits per byte of a checkpoint on sets of text."""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stablelm.config.schema import Config
from stablelm.data import corpus, inspection, validation
from stablelm.data.storage.options import ReadOptions
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError, Problems
from stablelm.evaluate.perplexity import evaluate, in_words
from stablelm.evaluate.trained_run import TrainedRun
from stablelm.evaluate.validation_text import validation_options, validation_paths
from stablelm.tokenizers import Tokenizer

WHOLE = sys.maxsize


@dataclass(frozen=True)
class Texts:
    """Files of a set, and how they are read."""

    files: list[str]
    options: ReadOptions


@dataclass(frozen=True)
class SetRequest:
    """Checked sets by name, and at most so many sequences of each."""

    sets: Mapping[str, Texts]
    sequences: int


def find_sets(
    data: list[str], sequences: int | None, config: Config, reading: Mapping[str, Any], tokenizer: Tokenizer
) -> SetRequest:
    """The sets that `data` names, as NAME=PATH or PATH, or the run's own; a problem with any is a ConfigError.

    `sequences`: None for as many as training used, 0 for all. `reading`: fields of `ReadOptions` that differ from the
    run's.
    """
    if sequences is None:
        sequences = config.evaluate.batches * config.train.batch_sizes.first
    paths: dict[str, str | list[str]] = {}
    for item in data:
        named = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", item)
        name, path = named.groups() if named else (f"data{len(paths)}" if paths else "data", item)
        if name in paths:
            raise ConfigError(f"--data names the set {name} twice; use different names")
        paths[name] = path
    paths = paths or validation_paths(config)
    if not paths:
        raise ConfigError("the run has no validation set; name text to evaluate on by --data PATH")
    tokens = (sequences or WHOLE) * config.data.seq_len + 1
    sets, problems = {}, Problems()
    for name, path in paths.items():
        with problems.collecting(key := f"--data {name}" if data else f"data.validation.{name}"):
            options = ReadOptions.of(config.data) if data else validation_options(config, name)
            options = replace(options, **reading)
            files = inspection.text_files(path, key=key, cache=config.data.cache, options=options)
            if all(map(corpus.is_local, files)):
                for _ in validation.touched(files, tokenizer, tokens=tokens, options=options):
                    pass
            sets[name] = Texts(files, options)
    problems.raise_any()
    return SetRequest(sets, sequences or WHOLE)


def score_sets(
    request: SetRequest, run: TrainedRun, engine: Engine, ranks: Ranks, show: Callable[[str], None]
) -> dict[str, Any]:
    """Figures of each set by name, the same on all ranks; `show` gets a line for each on rank 0. Collective."""
    figures = {}
    for name, texts in request.sets.items():
        windows = validation.read(
            texts.files,
            run.tokenizer,
            seq_len=run.config.data.seq_len,
            sequences=request.sequences,
            options=texts.options,
        )
        scores = evaluate(engine, ranks, windows, run.config.evaluate.micro_batch_size)
        figures[name] = scores.as_dict()
        if ranks.is_first:
            show(
                f"{name}: loss {scores.loss:.6f}  perplexity {scores.perplexity:.3f}  "
                f"{in_words(scores.bits_per_byte)}  tokens {scores.tokens}"
            )
    return figures
