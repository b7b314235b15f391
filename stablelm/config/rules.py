"""Rules between keys, and the values of keys that are derived from others."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from stablelm.config import (
    batch_sizes,
    data_rules,
    engine_rules,
    evaluation_rules,
    guard_rules,
    memory_rules,
    optimizer_rules,
    secret_rules,
    segments,
    train_rules,
    validation_sets,
)
from stablelm.config.durations import parse_duration
from stablelm.config.keys import assemble, one_of, values
from stablelm.config.ranges import ranges
from stablelm.config.schema import Config, ModelConfig, TrainConfig
from stablelm.config.train_rules import around, either, steps_of
from stablelm.config.typed_values import checked_options
from stablelm.errors import ConfigError
from stablelm.methods import catalogue
from stablelm.methods.catalogue import apply_method

VOCABULARY_MULTIPLE = 64
LARGEST_VOCABULARY_MULTIPLE = 128


def check(
    config: Config, world_size: int, accelerate_precision: str | None, origins: dict[str, str] | None = None
) -> None:
    """All rules that need no tokenizer; raises one ConfigError with a line for each broken one."""
    _Rules(config, origins).check(world_size, accelerate_precision).report()


def check_saved(config: Config) -> None:
    """The rules for the numbers and the model of a saved configuration; raises one ConfigError."""
    found = _Rules(config, None)
    found.ranges()
    found.model()
    found.report()


def problems(
    config: Config,
    world_size: int,
    accelerate_precision: str | None,
    origins: dict[str, str],
    unread: Iterable[str],
) -> list[str]:
    """What `check` would report of the keys that could be read; `unread` ones have their defaults in `config`."""
    return _Rules(config, origins, unread).check(world_size, accelerate_precision).problems


def resolve(
    config: Config,
    *,
    pieces: int,
    world_size: int,
    accelerate_precision: str | None,
    origins: dict[str, str] | None = None,
    eos: int = 0,
) -> Config:
    """Checks all rules and fills every derived key that is None; resolving the result changes nothing.

    `pieces` is the tokenizer's size and `eos` its end of a document, `world_size` the number of data-parallel ranks.
    Raises one ConfigError with a line for each broken rule.
    """
    config = _with_document_end(config, eos)
    rules = _Rules(config, origins).check(world_size, accelerate_precision)
    rules.vocabulary(pieces)
    rules.report()
    train = _resolve_train(config.train, config.data.seq_len, world_size, accelerate_precision)
    checkpoint = replace(config.checkpoint, dir=config.checkpoint.dir or f"{config.run.dir.rstrip('/')}/checkpoints")
    model = _resolve_model(config.model, config.data.seq_len, pieces)
    rules.add(train_rules.float8(config.train, model))
    rules.report()
    return replace(config, model=model, train=train, checkpoint=checkpoint)


def _with_document_end(config: Config, eos: int) -> Config:
    attention = config.model.attention
    if not config.data.document_mask or attention.document_end is not None:
        return config
    attention = replace(attention, document_end=eos)
    return replace(config, model=replace(config.model, attention=attention))


def _resolve_model(model: ModelConfig, seq_len: int, pieces: int) -> ModelConfig:
    model = replace(
        apply_method(model),
        kv_heads=_or(model.kv_heads, model.n_heads),
        max_seq_len=_or(model.max_seq_len, seq_len),
        vocab_size=_or(model.vocab_size, padded_vocabulary(pieces)),
    )
    return model.axes.stream.sized(model)


def _resolve_train(train: TrainConfig, seq_len: int, world_size: int, accelerate_precision: str | None) -> TrainConfig:
    steps = train.steps if train.tokens is None else steps_of(train.tokens, train, seq_len)
    assert steps is not None
    return replace(
        train,
        steps=steps,
        micro_batch_size=_or(train.micro_batch_size, train.batch_sizes.largest // world_size),
        min_lr=_or(train.min_lr, train.lr / 10),
        cooldown_steps=_or(train.cooldown_steps, steps // 5 if train.schedule in ("wsd", "power") else 0),
        power_after=_or(train.power_after, max(1, train.warmup_steps))
        if train.schedule == "power"
        else train.power_after,
        precision=_or(train.precision, accelerate_precision or "fp32"),
    )


def padded_vocabulary(pieces: int) -> int:
    """`model.vocab_size` for a tokenizer of so many pieces, where the key is null."""
    return _up(pieces, VOCABULARY_MULTIPLE)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Rules:
    """Collects a sentence for each broken rule.

    A key that is wrong by itself is reported once: the rules between keys use its default, and what they report of it
    is left out.
    """

    def __init__(self, config: Config, origins: dict[str, str] | None, unread: Iterable[str] = ()):
        self.config, self.origins = config, origins or {}
        self.unread = set(unread)
        self.problems: list[str] = []

    def broken(self, problem: str, *names: str) -> None:
        """`names` are the keys to blame; their origins end the sentence."""
        if any(_same_or_inside(name, wrong) for name in names if name for wrong in self.unread):
            return
        given = list(dict.fromkeys(self.origins[name] for name in names if name in self.origins))
        self.problems.append(problem + (f" ({', '.join(given)})" if given else ""))

    def report(self) -> None:
        if self.problems:
            raise ConfigError("\n".join(self.problems))

    def check(self, world_size: int, accelerate_precision: str | None) -> "_Rules":
        self.ranges()
        self.add(validation_sets.problems(self.config.data))
        self.add(data_rules.problems(self.config.data))
        for problem in secret_rules.problems(self.config):
            self.broken(problem)  # without where it was given: that may be an argument with the secret in it
        self.add(train_rules.precision(self.config.train, accelerate_precision))
        self.add(guard_rules.problems(self.config, world_size))
        self.add(evaluation_rules.problems(self.config))
        self.add(train_rules.length(self.config))
        self.add(train_rules.functions(self.config))
        self.model()
        self.add(train_rules.batches(self.config, world_size))
        self.add(segments.problems(self.config))
        self.add(engine_rules.problems(self.config, world_size))
        self.add(engine_rules.reduction(self.config, accelerate_precision))
        self.add(engine_rules.float8(self.config, accelerate_precision))
        self.add(train_rules.sharpness(self.config, accelerate_precision))
        self.add(memory_rules.problems(self.config, world_size))
        self.add(optimizer_rules.problems(self.config))
        return self

    def add(self, found: Iterable[tuple[str, str | tuple[str, ...]]]) -> None:
        for problem, names in found:
            self.broken(problem, *([names] if isinstance(names, str) else names))

    def ranges(self) -> None:
        """Numbers and words on their own; those out of their range get their defaults for the other rules."""
        wrong: set[str] = set()
        config = values(self.config)
        for expected, holds, name in ranges():
            for entry, value in _entries(name, config[name]).items():
                if value is not None and not holds(value):
                    self.broken(f"{entry}={_plain(value)} must be {expected}", entry)
                    wrong.add(name)
        if problem := batch_sizes.problem(self.config.train.global_batch_size):
            entries = _entries("train.global_batch_size", self.config.train.global_batch_size)
            self.broken(problem, "train.global_batch_size", *entries)
            wrong.add("train.global_batch_size")
        try:
            parse_duration(self.config.run.time_limit)
        except ConfigError as error:
            self.broken(str(error), "run.time_limit")
        profile = self.config.observe.profile
        if profile is not None and not 1 <= profile[0] <= profile[1]:
            self.broken(
                f"observe.profile={list(profile)} must be the first and the last step, counted from 1",
                "observe.profile",
            )
        self.unread |= wrong
        if wrong:
            self.config = assemble({name: value for name, value in config.items() if name not in wrong})

    def model(self) -> None:
        model, seq_len = self.config.model, self.config.data.seq_len
        try:
            whole = apply_method(model)
        except ConfigError as error:
            self.broken(str(error), "model.method")
            self.unread.add("model.method")
            whole = apply_method(replace(model, method=ModelConfig().method))
        whole = self.axes(whole)
        for problem, names in catalogue.problems(whole):
            self.broken(problem, *names, "model.method")
        self.add(data_rules.document_problems(self.config.data, whole))
        self.add(memory_rules.selective_problems(self.config, whole))
        self.add(optimizer_rules.model_problems(self.config, whole))
        even = 2 if whole.axes.position.pairs_features and "model.method" not in self.unread else 1
        if not whole.axes.stream.grows and model.d_model % (model.n_heads * even):
            why = (
                f"is not divisible by model.n_heads={model.n_heads}"
                if model.d_model % model.n_heads
                else f"gives each of model.n_heads={model.n_heads} heads an odd width, which rope cannot halve"
            )
            fits = around(model.n_heads, lambda n: model.d_model % (n * even) == 0, model.d_model)
            fix = f"use {either(fits, 'head')}" if fits else "use an even width"
            self.broken(f"model.d_model={model.d_model} {why}; {fix}", "model.d_model", "model.n_heads")
        if model.kv_heads is not None and model.n_heads % model.kv_heads:
            fits = around(model.kv_heads, lambda n: model.n_heads % n == 0, model.n_heads)
            self.broken(
                f"model.kv_heads={model.kv_heads} does not divide model.n_heads={model.n_heads}; "
                f"use {either(fits, 'key/value head')}",
                "model.kv_heads",
                "model.n_heads",
            )
        if model.max_seq_len is not None and model.max_seq_len < seq_len:
            self.broken(
                f"model.max_seq_len={model.max_seq_len} is below data.seq_len={seq_len}; raise it or leave it out",
                "model.max_seq_len",
                "data.seq_len",
            )

    def axes(self, model: ModelConfig) -> ModelConfig:
        """The model with axis values that exist, for the other rules; its axes are filled."""
        defaults = apply_method(ModelConfig())
        for axis, name in catalogue.KEYS.items():
            section, _, field = name.rpartition(".")
            known, given = catalogue.values(axis, model.method), getattr(model.attention if section else model, field)
            if given in known:
                continue
            self.broken(f"model.{name}={given} must be {one_of([*known, 'null'])}", f"model.{name}")
            self.unread.add(f"model.{name}")
            if section:
                own = getattr(defaults.attention, field)
                model = model.changed(attention=model.attention.changed(**{field: own}))
            else:
                model = model.changed(**{field: getattr(defaults, field)})
        return self.with_method_options(model)

    def with_method_options(self, model: ModelConfig) -> ModelConfig:
        """The model without options that no method has, or that are wrong."""
        if not model.method_options:
            return model
        own = catalogue.find(model.method).options if ":" in model.method else ()
        if not own:
            self.broken(
                f"model.method_options={model.method_options} belongs to methods named by import path, which "
                f"model.method={model.method} is not; remove it",
                "model.method_options",
            )
            return model.changed(method_options={})
        try:
            for kind in own:
                checked_options(kind, model.method_options)
        except ConfigError as error:
            self.broken(f"model.method_options: {error}", "model.method_options")
            self.unread.add("model.method_options")
            return model.changed(method_options={})
        return model

    def _begins_from_weights(self) -> bool:
        return self.config.run.init_from is not None or self.config.run.grow_from is not None

    def vocabulary(self, pieces: int) -> None:
        vocab, largest = self.config.model.vocab_size, _up(pieces, LARGEST_VOCABULARY_MULTIPLE)
        # What a run starts from may have been made for a larger vocabulary.
        if vocab is None or pieces <= vocab <= largest or (vocab > largest and self._begins_from_weights()):
            return
        relation = "smaller" if vocab < pieces else "larger"
        fits = f"{pieces}" if largest == pieces else f"{pieces} to {largest}"
        self.broken(
            f"model.vocab_size={vocab} is {relation} than the tokenizer, which has {pieces} pieces; "
            f"leave it out or use {fits}",
            "model.vocab_size",
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _entries(name: str, value: Any) -> dict[str, Any]:
    """A key's value by its name, or those of a mapping by theirs."""
    return {f"{name}.{entry}": each for entry, each in value.items()} if isinstance(value, dict) else {name: value}


def _same_or_inside(one: str, other: str) -> bool:
    """Whether two dotted names are equal, or one is an entry of the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
