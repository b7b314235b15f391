"""Evaluates a committed checkpoint in any world size, in the run's own precision and compile mode."""

import json
import re
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stablelm.checkpoint import keep
from stablelm.checkpoint.places import Place
from stablelm.config.saved import in_effect
from stablelm.config.schema import Config
from stablelm.data import corpus, inspection
from stablelm.data.embedded import embedded
from stablelm.data.options import ReadOptions
from stablelm.data.tokenizer import Tokenizer
from stablelm.engine.environment import Launch, accelerate_flags, detect, engine_kind
from stablelm.errors import ConfigError, UserError
from stablelm.train.prepare import validation_paths
from stablelm.train.start import OTHERS_WAIT_SECONDS, end_at_once, report

WHOLE = sys.maxsize


@dataclass(frozen=True)
class Request:
    """What to evaluate, all of it checked."""

    checkpoint: Place
    step: int
    config: Config
    kind: str
    tokenizer: Tokenizer
    sets: dict[str, list[str]]
    sequences: int


def evaluate_checkpoint(
    checkpoint: str, *, data: list[str], tokenizer: str | None, sequences: int | None, out: str | None
) -> int:
    """Prints the figures of each set and writes them to `out`; returns the exit code."""
    launch = Launch()
    try:
        launch = detect()
        request = _prepare(checkpoint, data, tokenizer, sequences, launch)
        if out is not None and not Path(out).parent.is_dir():
            raise ConfigError(f"--out {out}: its folder does not exist; create it first")
    except UserError as error:
        report(error, launch)
        return ConfigError.exit_code
    try:
        return _run(request, launch, out)
    except Exception as error:
        if isinstance(error, UserError):
            report(error, launch)
        else:
            time.sleep(OTHERS_WAIT_SECONDS if launch.rank else 0)
            traceback.print_exc()
        code = error.exit_code if isinstance(error, UserError) else 1
        if launch.world_size > 1:
            end_at_once(code)
        return code


def _prepare(checkpoint: str, data: list[str], tokenizer: str | None, sequences: int | None, launch: Launch) -> Request:
    from stablelm.checkpoint import contents

    found = keep.resolve_checkpoint(checkpoint, lacks=partial(contents.problems, optimizer=False))
    state = keep.read_state(found)
    config = _config(found, state["identity"])
    kind = engine_kind("auto", accelerate_flags(), launch.world_size)
    if sequences is None:
        sequences = config.evaluate.batches * config.train.global_batch_size
    return Request(
        checkpoint=found,
        step=state["step"],
        config=config,
        kind=kind,
        tokenizer=_tokenizer(tokenizer, found, config, state["identity"].get("data.tokenizer", "")),
        sets=_sets(data, config),
        sequences=sequences or WHOLE,
    )


def _config(checkpoint: Place, identity: dict[str, Any]) -> Config:
    """The configuration that was in effect when a checkpoint was saved."""
    file = checkpoint / "config.yaml"
    return in_effect(file.read_bytes().decode(), identity, str(file))


def _tokenizer(asked: str | None, checkpoint: Place, config: Config, sha256: str) -> Tokenizer:
    """The one that the run was trained with, by hash: as asked, as kept in the run directory, or as configured."""
    kept = checkpoint.parent.parent / "tokenizer.model" if isinstance(checkpoint, Path) else None
    path = asked or (str(kept) if kept is not None and kept.exists() else config.data.tokenizer)
    found = Tokenizer(embedded(config.data.cache).tokenizer if path == "embedded" else path)
    if found.sha256 != sha256:
        raise ConfigError(
            f"tokenizer {path} is not the one that {checkpoint} was trained with; name that one by --tokenizer"
        )
    return found


def _sets(data: list[str], config: Config) -> dict[str, list[str]]:
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
    sets = {}
    for name, path in paths.items():
        key = f"--data {name}" if data else f"data.validation.{name}"
        options = ReadOptions.of(config.data)
        sets[name] = corpus.resolve(path, key=key, cache=config.data.cache, options=options)
        inspection.check(sets[name], key=key, options=options)
    return sets


def _run(request: Request, launch: Launch, out: str | None) -> int:
    from stablelm.checkpoint.portable import load_tensors
    from stablelm.data import validation
    from stablelm.engine.build import build_engine
    from stablelm.engine.mesh import check_precision, connect, disconnect
    from stablelm.evaluate.perplexity import evaluate

    config = request.config
    ranks = connect(launch, request.kind)
    check_precision(str(config.train.precision), ranks.device)
    engine = build_engine(config, request.kind, ranks, train=False)
    load_tensors(request.checkpoint / "tensors", engine.tensors(optimizer=False), ranks.cpu_group, partial=True)
    engine.loaded()
    figures = {}
    for name, files in request.sets.items():
        texts = validation.read(
            files,
            request.tokenizer,
            seq_len=config.data.seq_len,
            sequences=request.sequences,
            options=ReadOptions.of(config.data),
        )
        scores = evaluate(engine, ranks, texts, config.evaluate.micro_batch_size)
        figures[name] = scores.as_dict()
        if ranks.is_first:
            print(
                f"{name}: loss {scores.loss:.6f}  perplexity {scores.perplexity:.3f}  "
                f"bits per byte {scores.bits_per_byte:.4f}  tokens {scores.tokens}",
                flush=True,
            )
    if ranks.is_first and out is not None:
        told = {"checkpoint": str(request.checkpoint), "step": request.step, "sets": figures, "tasks": {}}
        Path(out).write_text(json.dumps(told, indent=2) + "\n")
    disconnect(ranks)
    return 0
