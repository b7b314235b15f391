"""A study as a YAML file: which models are trained, how long, at which learning rates, and with how many seeds."""

# ruff: noqa: RUF009 - key() makes dataclass fields

import dataclasses
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from stablelm.config import text
from stablelm.config.keys import describe, find, takes_tuple
from stablelm.config.typed_values import adapter, show
from stablelm.errors import ConfigError
from stablelm.key import ABOVE_0, AT_LEAST_1, Range, key

AT_LEAST_0 = Range("at least 0", lambda v: v >= 0)
ABOVE_1 = Range("above 1", lambda v: v > 1)
SHARE = Range("from 0 to 1", lambda v: 0 <= v <= 1)
RATES = Range(
    "one or more numbers above 0, no two equal", lambda v: all(x > 0 for x in v) and 0 < len(set(v)) == len(v)
)
AMOUNTS = RATES
SEEDS = Range("one or more seeds, no two equal", lambda v: all(x >= 0 for x in v) and 0 < len(set(v)) == len(v))
SOME_SEEDS = Range("seeds, no two equal", lambda v: all(x >= 0 for x in v) and len(set(v)) == len(v))
INTERVAL = Range("two numbers above 0, the smaller first", lambda v: len(v) == 2 and 0 < v[0] < v[1])
NAME = Range("letters, digits, -, _ and dots", lambda v: re.fullmatch(r"\w[\w.-]*", v, re.ASCII) is not None)

DEPTH, WARMUP = "depth", "warmup_fraction"
TRAINING, COORDINATES = "training", "coordinates"
OWN = {
    "model.n_layers": "depth, or a list of shapes",
    "model.d_model": "shapes",
    "model.n_heads": "shapes.d_head",
    "model.d_ff": "shapes.ff_ratio",
    "train.lr": "lr",
    "run.seed": "seeds",
    "run.dir": "nothing: each run has a folder of its own",
    "train.steps": "budget",
    "train.tokens": "budget",
    "train.warmup_steps": "warmup_fraction",
}
"""Keys that a study sets itself, and what says what they become."""


@dataclass(frozen=True)
class ShapeRules:
    """How deep and wide the models are."""

    rule: Literal["equal_parameters", "fixed_width", "list"] = key(
        "fixed_width", "equal_parameters: the width follows from the depth; fixed_width: d_model at each depth; list"
    )
    parameters: int | None = key(None, "of equal_parameters: how many each model has", range=AT_LEAST_1)
    count: Literal["layers", "all"] = key("layers", "parameters of the layers alone, or with embedding, head and norm")
    d_model: int | None = key(None, "of fixed_width", unit="features", range=AT_LEAST_1)
    list_: list[str] | None = key(None, "of the rule list: LAYERSxWIDTH each, as in 24x64")
    d_head: int = key(16, "width of a head; each model has at least two", unit="features", range=AT_LEAST_1)
    ff_ratio: float = key(4.0, "feed-forward width of a model's width, before it is trimmed", range=ABOVE_0)
    multiple: int = key(16, "what divides each width, as d_head does", unit="features", range=AT_LEAST_1)
    tolerance: float = key(0.01, "how far parameters may be off, as a share", range=SHARE)


@dataclass(frozen=True)
class Budget:
    """How long each model trains: one of tokens, tokens_per_parameter and flops."""

    tokens: int | None = key(None, "of each run", range=AT_LEAST_1)
    tokens_per_parameter: list[float] | None = key(None, "by counted parameters; each is a column", range=AMOUNTS)
    flops: list[float] | None = key(
        None, "6 x matmul parameters and attention a token; each is a column", range=AMOUNTS
    )
    max_epochs: float = key(1.0, "how often a run may read the training text at most", range=ABOVE_0)


@dataclass(frozen=True)
class LearningRates:
    """The search for each cell's best learning rate."""

    start: list[float] = key([1.0e-3, 4.0e-3, 1.6e-2], "tried first", range=AMOUNTS)
    fixed: list[float] | None = key(None, "no search: these rates, whose best is the cell's", range=AMOUNTS)
    expand: float = key(4.0, "factor by which the range grows while its best rate is at an end", range=ABOVE_1)
    refine: float = key(2.0, "factor between neighbours of the best rate at which the search ends", range=ABOVE_1)
    bounds: list[float] = key([1.0e-5, 0.3], "rates beyond are not tried", range=INTERVAL)
    max_runs: int = key(7, "rates that a cell may try", range=AT_LEAST_1)


@dataclass(frozen=True)
class Seeds:
    """Seeds of weights and of the data order."""

    tune: list[int] = key([0], "of the search, whose mean loss decides", range=SEEDS)
    confirm: list[int] = key([1, 2, 3], "of the comparison, at the best rate", range=SOME_SEEDS)


@dataclass(frozen=True)
class Limits:
    """How much of this machine `run` may use."""

    jobs: int = key(1, "runs at once, one thread each", range=AT_LEAST_1)
    hours: float | None = key(None, "when runs stop with a checkpoint; the same command continues", range=ABOVE_0)


@dataclass(frozen=True)
class Resources:
    """GPUs of each run of `submit`: the first world size, and engine, by which `stablelm plan` lets a shape fit."""

    gpu: str | None = key(None, "name as plan takes it; null: runs of one process on CPUs")
    world_sizes: list[int] = key([1], "numbers of GPUs, from few to many", range=AMOUNTS)
    kinds: list[Literal["fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3"]] = key(
        ["fsdp2"], "engines, the first that fits is taken"
    )
    gpus_per_node: int = key(8, "GPUs of a node", range=AT_LEAST_1)


@dataclass(frozen=True)
class Study:
    """A study file. `lines`: the line of each key that was given, by dotted name."""

    study: str = key("", "its name, and that of its folder", range=NAME)
    kind: Literal["training", "coordinates"] = key(TRAINING, "coordinates: ten steps at one rate, sizes of features")
    base: str | list[str] = key("", "configuration of all runs, one or more files", path=True)
    grid: dict[str, list] = key({}, "values of keys, of depth and of warmup_fraction: each combination is a cell")
    shapes: ShapeRules = field(default_factory=ShapeRules, metadata={"text": ShapeRules.__doc__})
    budget: Budget = field(default_factory=Budget, metadata={"text": Budget.__doc__})
    warmup_fraction: float = key(0.05, "share of the steps in which the rate rises", range=SHARE)
    lr: LearningRates = field(default_factory=LearningRates, metadata={"text": LearningRates.__doc__})
    seeds: Seeds = field(default_factory=Seeds, metadata={"text": Seeds.__doc__})
    stages: list[Literal["tune", "confirm"]] = key(["tune", "confirm"], "what is run")
    limits: Limits = field(default_factory=Limits, metadata={"text": Limits.__doc__})
    resources: Resources = field(default_factory=Resources, metadata={"text": Resources.__doc__})
    dir: str | None = key(None, "folder of the runs; null: runs/studies/STUDY", path=True)
    keep_checkpoints: bool = key(False, "whether runs keep their checkpoints after their result is written")
    results: str | None = key(None, "folder of the result files; null: results, below dir", path=True)
    file: str = field(default="", metadata={"hidden": True})
    lines: dict[str, int] = field(default_factory=dict, metadata={"hidden": True}, hash=False, compare=False)

    def at(self, name: str) -> str:
        """Where a key was given: `FILE:LINE`, or the file."""
        parts = name.split(".")
        known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        line = next((self.lines[each] for each in known if each in self.lines), None)
        return f"{self.file}:{line}" if line else self.file

    @property
    def folder(self) -> Path:
        return Path(self.dir) if self.dir else Path("runs/studies") / self.study

    @property
    def results_folder(self) -> Path:
        return Path(self.results) if self.results else self.folder / "results"

    @property
    def bases(self) -> list[str]:
        return [self.base] if isinstance(self.base, str) else self.base


def read_study(file: str) -> Study:
    """The study of a YAML file. Raises ConfigError with a line for each problem that the file alone shows."""
    try:
        content = Path(file).read_text(encoding="utf-8")
        node = text.read(content)
    except OSError as error:
        raise ConfigError(f"--study {file} cannot be read: {error.strerror}; name an existing YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--study {file} is not UTF-8 text; name a YAML file") from None
    except text.TextError as error:
        raise ConfigError(f"{file}:{error.line}: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file}: a study file must be a mapping of keys; see docs/studies.md")
    reading = _Reading(file)
    try:
        study = reading.section(Study, node, "")
    except text.TextError as error:
        raise ConfigError(f"{file}:{error.line}: {error}") from None
    study = dataclasses.replace(study, file=file, lines=reading.lines)
    problems = reading.problems or [*_problems(study)]
    if problems:
        raise ConfigError("\n".join(problems))
    # Nothing is compared that seeds would have to confirm.
    return dataclasses.replace(study, stages=["tune"]) if study.kind == COORDINATES else study


class _Reading:
    """Values of a mapping as a dataclass takes them; what is wrong is collected."""

    def __init__(self, file: str):
        self.file, self.problems = file, []
        self.lines: dict[str, int] = {}

    def section(self, kind: type, node: yaml.MappingNode, prefix: str) -> Any:
        own = {f.name.rstrip("_"): f for f in dataclasses.fields(kind) if not f.metadata.get("hidden")}
        hints, made = get_type_hints(kind), {}
        for name, value, line in text.items(node):
            full, place = prefix + name, f"{self.file}:{line}"
            self.lines[full] = line
            if name not in own:
                near = difflib.get_close_matches(name, own, n=1)
                hint = f", did you mean {prefix}{near[0]}?" if near else f"; the keys here are {', '.join(own)}"
                self.problems.append(f"unknown key {full}{hint} ({place})")
                continue
            inner = hints[own[name].name]
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                if isinstance(value, yaml.MappingNode):
                    made[own[name].name] = self.section(inner, value, f"{full}.")
                else:
                    self.problems.append(f"{full} must be a section, a mapping of keys ({place})")
                continue
            self._lines_below(value, full)
            found = self._value(inner, text.plain(value), own[name].metadata.get("range"), full, place)
            if found is not None:
                made[own[name].name] = found
        return kind(**made)

    def _lines_below(self, node: yaml.Node, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            self.lines |= {f"{prefix}.{name}": line for name, _, line in text.items(node)}

    def _value(self, kind: Any, value: Any, allowed: Range | None, name: str, place: str) -> Any:
        """The value as its key takes it; None where it is null or wrong."""
        from pydantic import ValidationError  # slow to import

        if value is None:
            return None
        value = _whole(value)
        try:
            found = adapter(kind).validate_python(tuple(value) if takes_tuple(kind) else value, strict=True)
        except ValidationError:
            self.problems.append(f"{name}={show(value)} must be {_described(kind)} ({place})")
            return None
        if allowed is not None and not allowed.holds(found):
            self.problems.append(f"{name}={show(value)} must be {allowed.words} ({place})")
            return None
        return found


def _described(kind: Any) -> str:
    return "a mapping of keys to lists of values" if kind == dict[str, list] else describe(kind)


def _whole(value: Any) -> Any:
    """1.0e12 as the integer that it is; a key that takes any number takes it back."""
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _problems(study: Study) -> Iterator[str]:
    """What is wrong between keys."""
    for name in ("study", "base"):
        if not getattr(study, name):
            yield f"{name} is missing; give it ({study.file})"
    yield from _grid_problems(study)
    yield from _shape_problems(study)
    given = [name for name in ("tokens", "tokens_per_parameter", "flops") if getattr(study.budget, name) is not None]
    if study.kind == TRAINING and len(given) != 1:
        yield f"budget must have one of tokens, tokens_per_parameter and flops, not {len(given)} ({study.at('budget')})"
    if study.kind == COORDINATES:
        yield from _coordinates_problems(study, given)
    low, high = study.lr.bounds
    outside = [rate for rate in study.lr.start if not low <= rate <= high]
    if outside and study.lr.fixed is None:
        yield f"lr.start: {outside[0]:g} lies outside lr.bounds={[low, high]} ({study.at('lr.start')})"
    if study.lr.fixed is None and len(study.lr.start) > study.lr.max_runs:
        few = f"lr.max_runs={study.lr.max_runs} is less than the {len(study.lr.start)} rates of lr.start"
        yield f"{few} ({study.at('lr')})"
    if both := sorted(set(study.seeds.tune) & set(study.seeds.confirm)):
        yield (
            f"seeds: {both[0]} is in tune and in confirm; a comparison needs seeds that did not choose the rate "
            f"({study.at('seeds')})"
        )
    if "tune" not in study.stages:
        yield f"stages must begin with tune, which finds the rates ({study.at('stages')})"


def _coordinates_problems(study: Study, budget: list[str]) -> Iterator[str]:
    if study.lr.fixed is None or len(study.lr.fixed) != 1:
        yield f"kind={COORDINATES} trains every model at one rate; give lr.fixed: [RATE] ({study.at('lr')})"
    if budget:
        yield f"budget.{budget[0]}: kind={COORDINATES} makes ten steps; leave budget out ({study.at('budget')})"
    if WARMUP in study.grid or study.resources.gpu is not None:
        name = f"grid.{WARMUP}" if WARMUP in study.grid else "resources"
        yield f"{name}: kind={COORDINATES} makes ten steps at a constant rate on CPUs; leave it out ({study.at(name)})"


def _grid_problems(study: Study) -> Iterator[str]:
    for name, values in study.grid.items():
        where = study.at(f"grid.{name}")
        if not values:
            yield f"grid.{name} is empty; give at least one value ({where})"
        if len({show(value) for value in values}) < len(values):
            yield f"grid.{name} has a value twice ({where})"
        if name in OWN:
            yield f"grid.{name} is not for a grid: it follows from {OWN[name]} ({where})"
        elif name not in (DEPTH, WARMUP) and find(name)[0] is None:
            from stablelm.config.hints import nearest

            near = nearest(name) or next(iter(difflib.get_close_matches(name, (DEPTH, WARMUP), n=1)), None)
            yield f"unknown key grid.{name}{f', did you mean {near}?' if near else ''} ({where})"
    for value in study.grid.get(DEPTH, []):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"grid.depth: {show(value)} must be an integer of at least 1 ({study.at('grid.depth')})"
    for value in study.grid.get(WARMUP, []):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            yield f"grid.warmup_fraction: {show(value)} must be from 0 to 1 ({study.at('grid.warmup_fraction')})"


def _shape_problems(study: Study) -> Iterator[str]:
    shapes, where = study.shapes, study.at("shapes")
    needed = {"equal_parameters": "parameters", "fixed_width": "d_model", "list": "list_"}[shapes.rule]
    if getattr(shapes, needed) is None:
        yield f"shapes.rule={shapes.rule} needs shapes.{needed.rstrip('_')} ({where})"
    if shapes.rule == "list" and DEPTH in study.grid:
        yield f"shapes.rule=list names the depths; leave grid.depth out ({study.at('grid.depth')})"
    if shapes.rule != "list" and DEPTH not in study.grid:
        yield f"shapes.rule={shapes.rule} needs grid.depth, a list of depths ({where})"
    for each in shapes.list_ or []:
        if not all(part.isdecimal() and int(part) > 0 for part in each.split("x")) or each.count("x") != 1:
            yield f"shapes.list: {each} must be LAYERSxWIDTH, as in 24x64 ({where})"
