"""All that can be found wrong before anything is created: configuration, launcher, text, run directory.

Runs on every rank before any process group exists and without torch, so that a mistake costs a
second and not an allocation.
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stablelm.checkpoint import saved_run, selection
from stablelm.checkpoint.remote_path import RemotePath, checkpoint_path
from stablelm.config import identity as identities
from stablelm.config import rules, segments
from stablelm.config.load import Loaded
from stablelm.config.schema import Config, RunConfig
from stablelm.data import corpus, inspection, validation
from stablelm.data.corpus import configured_tokenizer
from stablelm.data.storage.options import ReadOptions
from stablelm.engine.launch_environment import AccelerateFlags, Launch, apply_flags
from stablelm.errors import CheckpointError, ConfigError, Problems
from stablelm.evaluate.generation.prompts import encode_prompts
from stablelm.evaluate.tasks.choice_items import ChoiceTask, read_task
from stablelm.evaluate.validation_text import validation_options, validation_paths
from stablelm.json_text import parse
from stablelm.observe import provenance
from stablelm.observe.sinks.loggers import check_loggers
from stablelm.small_files import read_small
from stablelm.supervise import attempts
from stablelm.tokenizers import Tokenizer
from stablelm.train import run_directory
from stablelm.train.source_tokenizer import check_tokenizer


@dataclass(frozen=True)
class Corpora:
    """Files by purpose, and what the run is (see `config.identity`)."""

    train: inspection.Sources
    validation: dict[str, list[str]]
    identity: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """`config` is resolved; `asked` is what it came from, with derived keys None."""

    config: Config
    asked: Config
    kind: str
    launch: Launch
    tokenizer: Tokenizer
    corpora: Corpora | None
    """None on ranks above 0 for remote text: rank 0 lists a store once for all of them."""
    tasks: Mapping[str, ChoiceTask] = field(default_factory=dict)
    attempt: int = 1
    """The number of this attempt, unless another start takes it first."""


def prepare(loaded: Loaded, launch: Launch, flags: AccelerateFlags, resume: str) -> Prepared:
    """Resolves the configuration and checks its inputs; ConfigError with one sentence a problem."""
    config = loaded.config
    attempt = next_attempt(Path(config.run.dir))
    try:
        concrete = apply_flags(config, flags, launch.world_size)
    except ConfigError as error:
        others = rules.problems(config, launch.world_size, flags.precision, loaded.origins, ())
        raise ConfigError("\n".join([str(error), *others])) from None
    rules.check(concrete, launch.world_size, flags.precision, loaded.origins)
    # The kind stays as it was written: what is resolved fits other launchers and world sizes too.
    config = replace(config, engine=replace(concrete.engine, kind=config.engine.kind))
    tokenizer = configured_tokenizer(config.data)
    config = rules.resolve(
        config,
        pieces=tokenizer.pieces,
        eos=tokenizer.eos,
        world_size=launch.world_size,
        accelerate_precision=flags.precision,
        origins=loaded.origins,
    )
    if config.train.loss is not None:
        from stablelm.model.token_loss import try_token_loss  # imports torch

        assert config.model.vocab_size is not None
        try_token_loss(config.train.loss, config.model.vocab_size)
    if config.train.moments != "fp32":
        from stablelm.engine.updates.moments import check_moments  # imports torch

        check_moments(config.train.moments)
    evaluate = config.evaluate
    encode_prompts(
        evaluate.samples,
        tokenizer,
        config.model,
        new_tokens=evaluate.sample_tokens,
        label="evaluate.samples: ",
        limit="evaluate.sample_tokens",
    )
    tasks = read_tasks(config, tokenizer)
    if launch.rank == 0:
        check_loggers(config)
    corpora = None
    if launch.rank == 0 or not _remote(config):
        corpora = find_corpora(config, tokenizer)
        check_run_dir(config, corpora.identity, resume, segments.allowed(loaded.asked))
        if (source := begins_from(config.run)) is not None and not _has_begun(config):
            check_tokenizer(*source, config, tokenizer)
    return Prepared(
        config, _asked(loaded.asked, flags), concrete.engine.kind, launch, tokenizer, corpora, tasks, attempt
    )


def next_attempt(run_dir: Path) -> int:
    """One more than the last attempt that has begun, also where attempts had no files of their own yet."""
    begun = [entry["attempt"] for entry in provenance.read(run_dir)]
    return 1 + max(attempts.newest(run_dir), *begun, 0)


def _asked(config: Config, flags: AccelerateFlags) -> Config:
    """What starts the same run again under any launcher: the keys, and the flag that is part of a run's identity."""
    precision: Any = config.train.precision or flags.precision
    return replace(config, train=replace(config.train, precision=precision))


def read_tasks(config: Config, tokenizer: Tokenizer) -> dict[str, ChoiceTask]:
    """The tasks of `evaluate.tasks` as tokens. Raises ConfigError with a line for each that is wrong."""
    longest, items = config.model.max_seq_len, config.evaluate.task_items
    assert longest is not None
    problems, found = Problems(), {}
    for name, path in config.evaluate.tasks.items():
        with problems.collecting():
            found[name] = read_task(path, tokenizer, longest=longest, items=items, key=f"evaluate.tasks.{name}")
    problems.raise_any()
    return found


def find_corpora(config: Config, tokenizer: Tokenizer) -> Corpora:
    """Lists and checks the training files and every validation set."""
    data = config.data
    known, tokens = known_files(config), config.train.batch_sizes.largest * data.seq_len + 1
    problems, train, found = Problems(), {}, {}
    with problems.collecting():
        train = inspection.find(data, tokenizer, tokens=tokens, lanes=data.lanes, known=known)
    for name, path in validation_paths(config).items():
        with problems.collecting(key := f"data.validation.{name}"):
            options = validation_options(config, name)
            found[name] = inspection.text(data, path, key=key, known=known, options=options)
            if all(map(corpus.is_local, found[name])):
                needed = config.evaluate.batches * config.train.batch_sizes.first * data.seq_len + 1
                for _ in validation.touched(found[name], tokenizer, tokens=needed, options=options):
                    pass
    problems.raise_any()
    check_remote(config, train, found, known)
    names = inspection.identity_names(train, data)
    return Corpora(train, found, identities.identity(config, base_names=names, tokenizer_sha256=tokenizer.sha256))


def check_remote(
    config: Config, train: inspection.Sources, sets: dict[str, list[str]], known: inspection.Lists
) -> None:
    """Checks remote text, except lists that the run began with: a failure of their store now is not bad input."""
    asked = {
        f"data.validation.{name}": (path, sets[name], validation_options(config, name))
        for name, path in validation_paths(config).items()
    }
    if config.data.source == "files":
        for name, path in inspection.paths(config.data).items():
            key = f"data.mixture.{name}.path" if name else "data.path"
            asked[key] = path, train[name], ReadOptions.of(config.data)
    problems = Problems()
    for key, (path, files, options) in asked.items():
        if json.dumps(path) not in known:
            with problems.collecting():
                inspection.check_remote(files, key=key, options=options)
    problems.raise_any()


def known_files(config: Config) -> dict[str, list[str]]:
    """Remote file lists that the run directory keeps: asked path, as JSON, -> files. A resume lists no store again."""
    try:
        return parse(read_small(Path(config.run.dir) / "data_files.json"), dict[str, list[str]])
    except (OSError, ValueError):
        return {}


def files_to_keep(config: Config, corpora: Corpora) -> dict[str, list[str]]:
    """What `known_files` is to find: the lists of remote paths, since local ones are looked up at once."""
    asked, sets = inspection.paths(config.data), validation_paths(config)
    lists = [(asked[name], files) for name, files in corpora.train.items()]
    lists += [(sets[name], files) for name, files in corpora.validation.items()]
    return {json.dumps(path): files for path, files in lists if not all(map(corpus.is_local, files))}


def _remote(config: Config) -> bool:
    paths = [*inspection.paths(config.data).values(), *validation_paths(config).values()]
    flat = [item for path in paths for item in (path if isinstance(path, list) else [path])]
    return not all(corpus.is_local(item) for item in flat)


def begins_from(run: RunConfig) -> tuple[str, str] | None:
    """The key that names another run from whose weights this one begins, and that run; None: from none."""
    given = {"run.init_from": run.init_from, "run.grow_from": run.grow_from}
    return next(((name, value) for name, value in given.items() if value is not None), None)


def check_run_dir(config: Config, identity: dict[str, Any], resume: str, allowed: Collection[str] = ()) -> None:
    """ConfigError if run.dir holds another run, or one that `--resume none` would overwrite.

    `allowed`: identity keys that may differ.
    """
    run_dir = Path(config.run.dir)
    run_directory.check(config)
    if config.run.init_from is not None and config.run.grow_from is not None:
        raise ConfigError(
            f"run.init_from={config.run.init_from} and run.grow_from={config.run.grow_from} both say what the run "
            "begins from; use one of them"
        )
    if (source := begins_from(config.run)) is not None and not _exists(source[1]):
        raise ConfigError(f"{source[0]}={source[1]} does not exist; name a run or checkpoint directory")
    if resume not in ("auto", "none") and not _exists(resume):
        raise ConfigError(f"--resume {resume} does not exist; give a run or checkpoint directory, auto or none")
    steps, begun = _has_begun(config), _has_text(run_dir / "metrics.jsonl")
    if not steps and not begun:
        return
    if not begun and (run_dir / selection.IMPORTED).exists():
        raise ConfigError(
            f"run.dir={run_dir} holds an imported model, which has no optimizer state to resume from; start a run from "
            f"its weights by run.init_from={run_dir} and another run.dir"
        )
    if not begun and not (run_dir / run_directory.IDENTITY).exists():
        return _check_checkpoints_alone(config, identity, resume, allowed)
    if resume == "none":
        raise ConfigError(
            f"run.dir={run_dir} already holds a run, which --resume none would overwrite; name another run.dir"
        )
    try:
        saved = run_directory.read_identity(run_dir)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"run.dir={run_dir} holds a run without a readable identity.json ({why}); put back the file, or name "
            "another run.dir"
        ) from error
    refuse_other_run(saved, identity, f"run.dir={run_dir}", allowed=allowed)


def _check_checkpoints_alone(config: Config, identity: dict[str, Any], resume: str, allowed: Collection[str]) -> None:
    """ConfigError where run.dir does not know the checkpoints, unless a store has kept them for a lost disk's run."""
    newest = selection.step_directories(checkpoint_path(str(config.checkpoint.dir)))[0]
    if resume == "none" or not isinstance(newest, RemotePath):
        raise ConfigError(
            f"checkpoint.dir={config.checkpoint.dir} holds checkpoints of another run than run.dir={config.run.dir}; "
            "name another checkpoint.dir, or leave it out"
        )
    with contextlib.suppress(CheckpointError):  # a damaged one is reported, and an older one checked, by the resume
        saved = dict(saved_run.read_state(newest)["identity"])
        where = f"checkpoint.dir={config.checkpoint.dir}"
        refuse_other_run(saved, identity, where, key="checkpoint.dir", allowed=allowed)


def _has_begun(config: Config) -> bool:
    """Whether there are checkpoints of the run."""
    return bool(selection.step_directories(checkpoint_path(str(config.checkpoint.dir))))


def _exists(path: str) -> bool:
    """Whether something is there that may be a checkpoint, or RUN_DIR/best may mean one."""
    found = checkpoint_path(path)
    return found.exists() or selection.is_best(found)


def refuse_other_run(
    saved: dict[str, Any],
    current: dict[str, Any],
    where: str,
    step: int | None = None,
    *,
    key: str = "run.dir",
    allowed: Collection[str] = (),
) -> None:
    """ConfigError naming the identity keys, but the allowed ones, in which a saved run differs from this one."""
    different = identities.differences(saved, current, step=step, allowed=allowed)
    if different:
        listed = "\n  ".join(different)
        names = [name for name in identities.changes(saved, current) if name not in allowed]
        may = set(names) <= set(segments.CHANGEABLE)
        fix = f", or give later steps the new values by run.allow=[{','.join(names)}]" if may else ""
        raise ConfigError(
            f"{where} belongs to a run with other settings; set them back or name another {key}{fix}:\n  {listed}"
        )


def _has_text(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
