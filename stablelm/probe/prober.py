"""From a configuration to a report of what the model does at its initialisation, on one CPU process."""

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stablelm.config import rules
from stablelm.config.load import Loaded, load
from stablelm.config.schema import Config, ModelConfig
from stablelm.data import inspection
from stablelm.data.corpus import configured_tokenizer
from stablelm.engine.launch_environment import Launch
from stablelm.errors import ConfigError
from stablelm.new_files import clear, replace_file
from stablelm.process_exit import exit_code_of
from stablelm.train.prepare import Corpora, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from stablelm.probe.predict import Prediction
    from stablelm.probe.probe_report import Probe

LONGEST = 256


@dataclass(frozen=True)
class ProbeRequest:
    """What to probe, all of it checked."""

    prepared: Prepared
    sequences: int
    seq_len: int
    out: Path

    @property
    def config(self) -> Config:
        return self.prepared.config


def probe(files: list[str], overrides: list[str], *, out: str | None, sequences: int, seq_len: int | None) -> int:
    """Prints the table and the verdict, writes probe.json and probe.png to `out`; returns the exit code."""
    return exit_code_of(lambda: prepare(load(files, overrides, world_size=1), out, sequences, seq_len), _run)


def prepare(loaded: Loaded, out: str | None, sequences: int, seq_len: int | None) -> ProbeRequest:
    """Resolves the configuration and checks its text and the arguments; `out` None: <run.dir>/probe.

    Raises ConfigError, in one sentence, before anything is created.
    """
    config = loaded.config
    rules.check(config, 1, None, loaded.origins)
    data = config.data
    tokenizer = configured_tokenizer(data)
    config = rules.resolve(
        config,
        pieces=tokenizer.pieces,
        eos=tokenizer.eos,
        world_size=1,
        accelerate_precision=None,
        origins=loaded.origins,
    )
    seq_len = _lengths(config, sequences, seq_len)
    folder = Path(out if out is not None else f"{config.run.dir.rstrip('/')}/probe")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a directory")
    files = inspection.find(data, tokenizer, tokens=sequences * seq_len + 1)
    prepared = Prepared(config, loaded.asked, "single", Launch(), tokenizer, Corpora(files, {}, {}))
    return ProbeRequest(prepared, sequences, seq_len, folder)


def _lengths(config: Config, sequences: int, seq_len: int | None) -> int:
    """The length of the sequences, checked."""
    longest = config.model.max_seq_len or config.data.seq_len
    if sequences < 1:
        raise ConfigError(f"--sequences {sequences} must be at least 1")
    if seq_len is None:
        seq_len = min(config.data.seq_len, LONGEST)
    if seq_len < 2:
        raise ConfigError(f"--seq-len {seq_len} leaves no two tokens to compare; ask for at least 2")
    if seq_len > longest:
        raise ConfigError(f"--seq-len {seq_len} is longer than model.max_seq_len={longest}; ask for at most {longest}")
    return seq_len


def _run(request: ProbeRequest) -> None:
    from rich.console import Console

    from stablelm.probe.disk_offload import unwritable
    from stablelm.probe.probe_report import as_json, draw, reasons, table

    create(request.out)
    model = request.config.model
    print(
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {request.sequences} x {request.seq_len} tokens of "
        f"{request.config.data.path}, {_precision(request.config)}{_instead(request.config)}",
        flush=True,
    )
    made = make(request)
    # A log has no width of its own: the table is not cut there.
    Console(width=None if sys.stdout.isatty() else 130).print(table(made))
    for text in (*reasons(made), made.verdict.text):
        print(textwrap.fill(text, 110))
    try:
        replace_file(request.out / "probe.json", json.dumps(as_json(made), indent=1, allow_nan=False) + "\n")
        clear(request.out / "probe.png")
        draw(made, request.out / "probe.png")
    except OSError as error:
        raise unwritable(request.out, error) from error
    print(f"written: {request.out}/probe.json, {request.out}/probe.png ({made.seconds:.1f} s)")


def create(folder: Path) -> None:
    """Makes a folder. Raises StorageError."""
    from stablelm.probe.disk_offload import unwritable

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def _precision(config: Config) -> str:
    return "fp64" if config.train.precision == "fp64" else "fp32"


def _instead(config: Config) -> str:
    return " in place of bf16" if config.train.precision == "bf16" else ""


def make(request: ProbeRequest) -> "Probe":
    """The probe of a checked request, whose folder exists: it holds the layers meanwhile."""
    from stablelm.probe.changes import FirstUpdate
    from stablelm.probe.measure import measure
    from stablelm.probe.predict import predict, predict_sensitivity, unpredicted
    from stablelm.probe.probe_report import Probe
    from stablelm.probe.run_records import read_records
    from stablelm.probe.signals import signals_of
    from stablelm.probe.verdict import verdict
    from stablelm.train.job import first_rows

    started = time.perf_counter()
    config, model = request.config, request.config.model
    tokens, targets = first_rows(request.prepared, request.sequences, request.seq_len)
    collision = collision_of(tokens)
    with progress(4 * model.n_layers, "layers, up and down") as on_layer:
        measured = measure(
            model,
            tokens,
            targets,
            precision=_precision(config),
            seed=config.run.seed,
            pieces=request.prepared.tokenizer.pieces,
            folder=request.out,
            z_loss=config.train.z_loss,
            update=FirstUpdate.of(model, config.train),
            on_layer=on_layer,
        )

    def theory(of: ModelConfig) -> "Prediction":
        return predict(of, seq_len=request.seq_len, tokens=tokens.numel(), collision=collision)

    reference = reference_model(config, request.prepared.tokenizer.pieces)
    beside = None if reference in (None, model) else theory(reference)
    assert model.vocab_size is not None
    prediction = theory(model)
    signals = signals_of(measured, vocab_size=model.vocab_size, seq_len=request.seq_len)
    return Probe(
        method=model.method,
        n_layers=model.n_layers,
        d_model=model.d_model,
        seq_len=request.seq_len,
        tokens=tokens.numel(),
        collision=collision,
        measured=measured,
        prediction=prediction,
        unpredicted=unpredicted(model, prediction),
        sensitivity=predict_sensitivity(model, prediction, request.seq_len),
        verdict=verdict(measured.internals, signals, beside, read_records(), _precision(config)),
        seconds=time.perf_counter() - started,
    )


def reference_model(config: Config, pieces: int) -> ModelConfig | None:
    """deepscalelm_pre at the shape of a resolved config, its axes the method's own; None where it has no such shape."""
    from stablelm.probe.verdict import REFERENCE

    model = config.model
    shape = {name: getattr(model, name) for name in ("n_layers", "d_model", "n_heads", "kv_heads", "dropout")}
    text = {name: getattr(model, name) for name in ("max_seq_len", "vocab_size")}
    asked = replace(config, model=ModelConfig(method=REFERENCE, **shape, **text))
    try:
        return rules.resolve(asked, pieces=pieces, world_size=1, accelerate_precision=None).model
    except ConfigError:
        return None  # one or two layers leave nothing of its skip


def collision_of(tokens: "Tensor") -> float:
    """Share of pairs of different positions of a sequence that hold the same token; tokens: (rows, seq)."""
    import torch

    seq_len = tokens.shape[1]
    same = sum(float(torch.bincount(row).double().square().sum()) - seq_len for row in tokens)
    return same / (len(tokens) * seq_len * (seq_len - 1))


@contextmanager
def progress(total: int, words: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing in a log; gives what advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=total)
        yield lambda: bar.advance(task)
