"""The cells of a study: each combination of the grid, a shape and a budget, as the configuration of its runs."""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stablelm.config import identity as identities
from stablelm.config import rules
from stablelm.config.load import Loaded, load
from stablelm.config.schema import Config, DataConfig, ModelConfig
from stablelm.data import inspection
from stablelm.data.corpus import configured_tokenizer
from stablelm.errors import ConfigError, Problems
from stablelm.evaluate.validation_text import validation_paths
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.study.results import ID_LENGTH
from stablelm.study.shapes import Shape, counted, shapes_of, with_shape
from stablelm.study.study_file import COORDINATES, DEPTH, TRAINING, WARMUP, Study
from stablelm.tokenizers import Tokenizer


@dataclass(frozen=True)
class Cell:
    """A model, a text and a budget; its runs differ in rate and seed. `config` is resolved, `asked` is not."""

    point: tuple[tuple[str, Any], ...]
    """Grid values by key, the depth and the budget's column among them."""
    shape: Shape
    config: Config
    asked: Config
    texts: "StudyTexts"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identity keys of its runs, but for rate and seed. Looks up text and tokenizer: raises ConfigError."""
        data = self.asked.data
        sha256 = self.texts.tokenizer(data).sha256
        return identities.identity(self.config, base_names=self.texts.names(data), tokenizer_sha256=sha256)

    @cached_property
    def name(self) -> str:
        return " ".join(str(value) if key == "model.method" else f"{_short(key)}={value}" for key, value in self.point)

    @property
    def tokens(self) -> int:
        train = self.config.train
        assert train.steps is not None
        return train.steps * train.batch_sizes.largest * self.config.data.seq_len

    @property
    def flops(self) -> float:
        """Of a run, forward and backward."""
        return self.tokens * flops_per_token(self.config.model, self.config.data.seq_len)

    @cached_property
    def counts(self) -> dict[str, int]:
        return parameter_counts(self.config.model)

    def group(self, *without: str) -> tuple[tuple[str, Any], ...]:
        """The point without some of its keys: cells that a comparison sets side by side share it."""
        return tuple((key, value) for key, value in self.point if key not in without)


@dataclass(frozen=True)
class Run:
    """One training run of a cell."""

    cell: Cell
    lr: float
    seed: int

    @cached_property
    def id(self) -> str:
        """Hash of the identity keys: two runs with the same one have the same losses."""
        own = self.cell.identity | {
            "train.lr": self.lr,
            "train.min_lr": self.config.train.min_lr,
            "run.seed": self.seed,
        }
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:ID_LENGTH]

    @property
    def config(self) -> Config:
        """As it is asked for, without a folder."""
        asked = self.cell.asked
        train = replace(asked.train, lr=self.lr, min_lr=asked.train.min_lr or self.lr / 10)
        return replace(asked, train=train, run=replace(asked.run, seed=self.seed))

    def __str__(self) -> str:
        return f"{self.cell.name} lr={self.lr:g} seed={self.seed}"


def _short(key: str) -> str:
    return key.removeprefix("model.").removeprefix("train.")


class StudyTexts:
    """Tokenizers and training files by data section, each looked up once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tokenizer, inspection.Sources]] = {}
        self._needed: dict[str, tuple[DataConfig, int]] = {}

    def tokenizer(self, data: DataConfig) -> Tokenizer:
        return self._of(data)[0]

    def names(self, data: DataConfig) -> Any:
        """The files as a run's identity has them."""
        return inspection.identity_names(self._of(data)[1], data)

    def sources(self, data: DataConfig) -> inspection.Sources:
        return self._of(data)[1]

    def need(self, data: DataConfig, tokens: int) -> None:
        """Notes that a run reads so many tokens of the text before it begins again."""
        known = self._needed.get(repr(data), (data, 0))[1]
        self._needed[repr(data)] = data, max(known, tokens)

    def check_enough(self) -> None:
        """Raises ConfigError where a text does not hold what was noted."""
        for data, tokens in self._needed.values():
            try:
                inspection.find(data, self.tokenizer(data), tokens=tokens)
            except ConfigError:
                raise ConfigError(
                    f"a run reads {tokens:,} tokens of the text before it begins again, and the text holds fewer; "
                    "lower the budget, raise budget.max_epochs or give more text in data.path"
                ) from None

    def _of(self, data: DataConfig) -> tuple[Tokenizer, inspection.Sources]:
        if repr(data) not in self._found:
            tokenizer = configured_tokenizer(data)
            self._found[repr(data)] = (
                tokenizer,
                inspection.find(data, tokenizer, tokens=data.seq_len + 1, lanes=data.lanes),
            )
        return self._found[repr(data)]


def cells_of(study: Study, texts: StudyTexts | None = None, *, look: bool = True) -> list[Cell]:
    """All cells in the grid's order. Raises one ConfigError with a line for each that cannot be trained.

    Without `look` the text is not looked at, nor the tokenizer where `model.vocab_size` is given: the shapes are known,
    the runs' identities are not.
    """
    texts, problems, found = texts or StudyTexts(), Problems(), []
    names = [name for name in study.grid if name != DEPTH]
    for values in itertools.product(*(study.grid[name] for name in names)):
        chosen = dict(zip(names, values, strict=True))
        for depth in study.grid.get(DEPTH, [None]):
            with problems.collecting():
                found += _cells_at(study, chosen, depth, texts)
    with problems.collecting(), _blamed(study, "budget"):
        if look:
            texts.check_enough()
    problems.raise_any()
    for cell in found if look else ():
        assert cell.identity
    return found


def _cells_at(study: Study, chosen: dict[str, Any], depth: int | None, texts: StudyTexts) -> Iterator[Cell]:
    where = " ".join(f"{key}={value}" for key, value in [*chosen.items(), *([(DEPTH, depth)] if depth else [])])
    given = {key: value for key, value in chosen.items() if key != WARMUP}
    with _blamed(study, "grid", where):
        sketch = _loaded(study, given).config
        if study.kind == TRAINING and not validation_paths(sketch):
            raise ConfigError("data.validation is missing, whose loss a study compares; give it in the base")
        model = replace(
            sketch.model,
            max_seq_len=sketch.model.max_seq_len or sketch.data.seq_len,
            vocab_size=sketch.model.vocab_size or rules.padded_vocabulary(texts.tokenizer(sketch.data).pieces),
        )
        for shape in shapes_of(study, model, depth):
            sized = with_shape(model, shape)
            for column, tokens in _budgets(study, sketch, sized):
                steps, warmup = _steps(study, sketch, tokens), chosen.get(WARMUP, study.warmup_fraction)
                length = {"train.steps": steps, "train.warmup_steps": round(warmup * steps)}
                asked = _loaded(study, given | shape.keys() | length | {"train.lr": _first_rate(study)}).config
                point = [*chosen.items(), (DEPTH, shape.n_layers), *column]
                yield _cell(tuple(point), shape, asked, texts)
                batch = asked.train.batch_sizes.largest * asked.data.seq_len
                texts.need(asked.data, math.ceil(steps * batch / study.budget.max_epochs))


@contextmanager
def _blamed(study: Study, key: str, where: str = "") -> Iterator[None]:
    """Says which cell of which file a mistake is in."""
    try:
        yield
    except ConfigError as error:
        cell = f"cell {where}, " if where else ""
        raise ConfigError("\n".join(f"{line} ({cell}{study.at(key)})" for line in str(error).splitlines())) from None


def _loaded(study: Study, given: dict[str, Any]) -> Loaded:
    return load([_base(study, file) for file in study.bases], [], given=given, place="study")


def _base(study: Study, file: str) -> str:
    """A base that is not found from here is looked for beside the study."""
    beside = Path(study.file).parent / file
    return str(beside) if not Path(file).is_file() and beside.is_file() else file


def _first_rate(study: Study) -> float:
    return (study.lr.fixed or study.lr.start)[0]


def _budgets(study: Study, config: Config, model: ModelConfig) -> Iterator[tuple[list[tuple[str, Any]], float]]:
    """The budget's columns, each as an addition to the point, with its tokens."""
    budget, seq_len = study.budget, config.data.seq_len
    if study.kind == COORDINATES:
        from stablelm.probe.coordinates import STEPS  # slow to import

        yield [], STEPS * config.train.batch_sizes.largest * seq_len
    if budget.tokens is not None:
        yield [], budget.tokens
    for each in budget.tokens_per_parameter or []:
        yield [("tokens_per_parameter", each)], each * counted(study, model)
    for each in budget.flops or []:
        yield [("flops", each)], each / flops_per_token(model, seq_len)


def _steps(study: Study, config: Config, tokens: float) -> int:
    batch = config.train.batch_sizes.largest * config.data.seq_len
    if tokens < batch:
        raise ConfigError(f"the budget of {tokens:,.0f} tokens is less than one step of {batch:,}; raise the budget")
    return round(tokens / batch)


def _cell(point: tuple[tuple[str, Any], ...], shape: Shape, asked: Config, texts: StudyTexts) -> Cell:
    vocab, eos = asked.model.vocab_size, 0
    if vocab is None or asked.data.document_mask:
        tokenizer = texts.tokenizer(asked.data)
        vocab, eos = tokenizer.pieces, tokenizer.eos
    config = rules.resolve(asked, pieces=vocab, eos=eos, world_size=1, accelerate_precision=None)
    return Cell(point, shape, config, asked, texts)
