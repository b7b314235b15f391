"""Text that an export looks at: documents to compare tokenizers on, and a few tokens of them to run the model on."""

from itertools import islice

import torch
from torch import Tensor

from stablelm.data import corpus, inspection
from stablelm.data.formats.file_rows import documents
from stablelm.data.storage.options import ReadOptions
from stablelm.errors import ConfigError, DataError
from stablelm.evaluate.trained_run import TrainedRun
from stablelm.evaluate.validation_text import validation_options, validation_paths

EMBEDDED = "embedded"
CHECKED_DOCUMENTS, CHECKED_CHARACTERS = 2000, 1 << 24
CALIBRATED_ROWS, CALIBRATED_LENGTH = 4, 128


def sample_documents(run: TrainedRun, given: str | None) -> list[str]:
    """Documents on which the tokenizer is compared: of the file given, else of the run's validation text if it is here.

    Raises ConfigError for a file that holds none.
    """
    if given is not None:
        options = ReadOptions.of(run.config.data)
        files = inspection.text_files(given, key="--check-tokenizer", cache=run.config.data.cache, options=options)
        return _some(files, options)
    for name, path in validation_paths(run.config).items():
        if not all(map(corpus.is_local, [path] if isinstance(path, str) else path)):
            continue
        if path == EMBEDDED and run.config.data.tokenizer != EMBEDDED:
            continue  # what is meant where the run's own text is not believed, and takes long to build
        options = validation_options(run.config, name)
        try:
            return _some(inspection.text_files(path, key=name, cache=run.config.data.cache, options=options), options)
        except (ConfigError, DataError):
            continue  # the text of a run may have moved
    return []


def _some(files: list[str], options: ReadOptions) -> list[str]:
    found: list[str] = []
    left = CHECKED_CHARACTERS
    for text in islice(documents(files, options), CHECKED_DOCUMENTS):
        found.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return found


def sample_tokens(run: TrainedRun, texts: list[str]) -> Tensor:
    """(rows, length) int64: of the documents, or drawn evenly where there are not enough."""
    model = run.config.model
    assert model.max_seq_len is not None
    length = min(CALIBRATED_LENGTH, model.max_seq_len)
    ids: list[int] = []
    for text in texts:
        if len(ids) >= CALIBRATED_ROWS * length:
            break
        ids += [*run.tokenizer.encode(text[: 16 * length]), run.tokenizer.eos]
    missing = max(0, CALIBRATED_ROWS * length - len(ids))
    drawn = torch.randint(run.tokenizer.pieces, (missing,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(ids[: CALIBRATED_ROWS * length], dtype=torch.int64), drawn]).view(-1, length)
