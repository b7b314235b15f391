"""The bigram model's loss for each cell, kept in the study's folder: cells with the same text and budget share it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from stablelm.config.schema import Config
from stablelm.data import inspection, validation
from stablelm.errors import UserError
from stablelm.evaluate.validation_text import validation_options, validation_paths
from stablelm.json_text import parse
from stablelm.new_files import replace_file
from stablelm.study.bigram import bigram_loss
from stablelm.study.cells import Cell, StudyTexts
from stablelm.study.study_file import Study

FILE = "bigram.json"
MOST_TOKENS = 50_000_000
"""A larger budget is not counted: minutes, and gigabytes of pairs."""


def bigram_losses(study: Study, cells: Sequence[Cell], message: Callable[[str], None]) -> dict[str, float | None]:
    """Nats by the cell's name; None for large budgets, and where the text cannot be read, which `message` is given.

    Raises OSError.
    """
    file = study.results_folder / FILE
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):
        known = parse(file.read_bytes(), dict[str, float])
    found: dict[str, float | None] = {}
    for cell in cells:
        name = _name(study, cell)
        if name not in known and cell.tokens <= MOST_TOKENS:
            try:
                known[name] = round(_loss(study, cell.config, cell.texts), 6)
                _keep(file, known)
            except UserError as error:
                message(f"warning: no bigram loss for {cell.name}: {error}")
        found[cell.name] = known.get(name)
    return found


def _name(study: Study, cell: Cell) -> str:
    """Hash of all that the tokens of a run and of its validation set depend on."""
    own = {key: value for key, value in cell.identity.items() if key.startswith("data.")}
    config = cell.config
    sets = {name: str(path) for name, path in validation_paths(config).items()}
    batch = cell.identity["train.global_batch_size"]
    words = [own, config.train.steps, batch, config.evaluate.batches, sets, study.seeds.tune[0]]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()[:16]


def _loss(study: Study, config: Config, texts: StudyTexts) -> float:
    name, path = next(iter(validation_paths(config).items()))
    options = validation_options(config, name)
    files = inspection.text_files(path, key=f"data.validation.{name}", cache=config.data.cache, options=options)
    tokenizer, count = texts.tokenizer(config.data), config.evaluate.batches * config.train.batch_sizes.first
    windows = validation.read(files, tokenizer, seq_len=config.data.seq_len, sequences=count, options=options)
    return bigram_loss(config, texts.sources(config.data), tokenizer, windows, study.seeds.tune[0])


def _keep(file: Path, known: Mapping[str, float]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(known, indent=1) + "\n")
