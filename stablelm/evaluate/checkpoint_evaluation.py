"""Evaluates a committed checkpoint in any world size, in the run's own precision and compile mode."""

import json
import re
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.data import corpus, inspection, validation
from stablelm.data.storage.options import ReadOptions
from stablelm.data.tokenizer import Tokenizer
from stablelm.engine.launch_environment import Launch, accelerate_flags, detect, engine_kind
from stablelm.errors import ConfigError, Problems, UserError
from stablelm.evaluate import consent
from stablelm.evaluate.trained_run import TrainedRun, open_run
from stablelm.evaluate.validation_text import validation_options, validation_paths
from stablelm.process_exit import OTHERS_WAIT_SECONDS, end_at_once, report

WHOLE = sys.maxsize


@dataclass(frozen=True)
class Texts:
    """Files of a set, and how they are read."""

    files: list[str]
    options: ReadOptions


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, all of it checked."""

    run: TrainedRun
    kind: str
    sets: dict[str, Texts]
    sequences: int


def evaluate_checkpoint(
    checkpoint: str,
    *,
    data: list[str],
    tokenizer: str | None,
    sequences: int | None,
    out: str | None,
    reading: Mapping[str, str] | None = None,
    config: list[str] | None = None,
    trusted: bool = False,
) -> int:
    """Prints the figures of each set and writes them to `out`; returns the exit code.

    `reading`: fields of `ReadOptions` that differ from the run's. `config`: files of the user's own configuration;
    `trusted`: the checkpoint's is used like it.
    """
    launch = Launch()
    try:
        launch = detect()
        own = consent.own_configuration(config or [])
        request = _prepare(checkpoint, data, tokenizer, sequences, reading or {}, launch, own, trusted)
        if out is not None and not Path(out).parent.is_dir():
            raise ConfigError(f"--out {out}: its folder does not exist; create it first")
    except UserError as error:
        report(error, launch.rank)
        return ConfigError.exit_code
    try:
        return _run(request, launch, out)
    except Exception as error:
        if isinstance(error, UserError):
            report(error, launch.rank)
        else:
            time.sleep(OTHERS_WAIT_SECONDS if launch.rank else 0)
            traceback.print_exc()
        code = error.exit_code if isinstance(error, UserError) else 1
        if launch.world_size > 1:
            end_at_once(code)
        return code


def _prepare(
    checkpoint: str,
    data: list[str],
    tokenizer: str | None,
    sequences: int | None,
    reading: Mapping[str, str],
    launch: Launch,
    own: Loaded | None,
    trusted: bool,
) -> EvaluationRequest:
    run = open_run(
        checkpoint, tokenizer=tokenizer, has_data=bool(data), own=own, trusted=trusted, first_rank=launch.rank == 0
    )
    config = run.config
    if sequences is None:
        sequences = config.evaluate.batches * config.train.global_batch_size
    return EvaluationRequest(
        run=run,
        kind=engine_kind("auto", accelerate_flags(), launch.world_size),
        sets=_sets(data, config, reading, run.tokenizer, (sequences or WHOLE) * config.data.seq_len + 1),
        sequences=sequences or WHOLE,
    )


def _sets(
    data: list[str], config: Config, reading: Mapping[str, Any], tokenizer: Tokenizer, tokens: int
) -> dict[str, Texts]:
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
    return sets


def _run(request: EvaluationRequest, launch: Launch, out: str | None) -> int:
    from stablelm.checkpoint.format import load_tensors
    from stablelm.engine.interface import build_engine
    from stablelm.engine.ranks import check_precision, connect, disconnect
    from stablelm.evaluate.perplexity import evaluate, in_words

    run, config = request.run, request.run.config
    ranks = connect(launch, request.kind)
    check_precision(str(config.train.precision), ranks.device)
    engine = build_engine(config, request.kind, ranks, train=False)
    load_tensors(run.checkpoint / "tensors", engine.tensors(optimizer=False), ranks.cpu_group, partial=True)
    engine.loaded()
    figures = {}
    for name, texts in request.sets.items():
        windows = validation.read(
            texts.files,
            run.tokenizer,
            seq_len=config.data.seq_len,
            sequences=request.sequences,
            options=texts.options,
        )
        scores = evaluate(engine, ranks, windows, config.evaluate.micro_batch_size)
        figures[name] = scores.as_dict()
        if ranks.is_first:
            print(
                f"{name}: loss {scores.loss:.6f}  perplexity {scores.perplexity:.3f}  "
                f"{in_words(scores.bits_per_byte)}  tokens {scores.tokens}",
                flush=True,
            )
    if ranks.is_first and out is not None:
        figures_of = {"checkpoint": str(run.checkpoint), "step": run.step, "sets": figures, "tasks": {}}
        Path(out).write_text(json.dumps(figures_of, indent=2) + "\n")
    disconnect(ranks)
    return 0
