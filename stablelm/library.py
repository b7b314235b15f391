"""The programs as functions, for notebooks and other programs: in one process, with results and exceptions.

A user's mistake raises ConfigError, what the data, a checkpoint or the storage lacks one of its siblings
(`stablelm.errors`). A process that called any of these goes on as before.
"""

import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stablelm.config.keys import values
from stablelm.config.load import Loaded, load
from stablelm.config.schema import Config
from stablelm.engine.launch_environment import AccelerateFlags, Launch, detect
from stablelm.errors import ConfigError
from stablelm.paths import expand

if TYPE_CHECKING:
    from stablelm.export.writer import Exported
    from stablelm.train.prepare import Prepared

Place = str | os.PathLike[str]


def load_config(*files: Place, overrides: Sequence[str] = (), **given: Any) -> Config:
    """A run's configuration: YAML files or packaged names (`quickstart`), merged in order, then single keys.

    `overrides`: `key.path=value` as on the command line, `given`: sections as mappings, `train={"steps": 10}`, or
    dotted names by `**`. Raises ConfigError with a line for each problem.
    """
    return load([os.fspath(file) for file in files], [*overrides], given=given, place="load_config").config


@dataclass(frozen=True)
class TrainingResult:
    """How `train` ended. `exit_code`: 0 at the last step, 75 after a stop, whose `reason` is not empty then.

    `loss`: nats per token over the last interval of `observe.every` steps, `val_loss`: by validation set, both None
    where the run has none.
    """

    run_dir: Path
    exit_code: int
    reason: str
    step: int
    tokens: int
    loss: float | None
    val_loss: dict[str, float] | None


def train(config: Config, *, resume: str = "auto") -> TrainingResult:
    """Trains to the last step or a stop, from the newest checkpoint of `run.dir` if there is one.

    `resume`: auto, none (only a new run) or the path of a checkpoint. While it trains, a first interrupt, SIGTERM,
    SIGHUP or SIGUSR1 stops it with a checkpoint, a second one raises KeyboardInterrupt; called from another than the
    main thread, it leaves signals alone. Raises ConfigError before anything is created, and later DataError,
    StorageError, CheckpointError and DivergedError.
    """
    from stablelm.train.prepare import prepare

    started = time.time()
    _alone("train", "torchrun -m stablelm pretrain")
    prepared = prepare(_loaded(config), Launch(), AccelerateFlags(), resume)
    if prepared.kind.startswith("zero"):
        raise ConfigError(
            f"engine.kind={config.engine.kind} keeps state in its process, which stablelm.train leaves as it was; use "
            "auto, or start stablelm pretrain"
        )
    from stablelm.engine.process import environment

    with environment.variables_kept():
        environment.set_variables(prepared.config)
        return _trained(prepared, resume, started)


def _trained(prepared: "Prepared", resume: str, started: float) -> TrainingResult:
    """Trains a prepared run and leaves the process as it was."""
    from stablelm.engine.ranks import close_groups
    from stablelm.observe.progress import Progress
    from stablelm.supervise.shutdown import Ending
    from stablelm.train.run import attempt, conclude

    ending = Ending(prepared.config.run.dir, Launch(), Progress(), process_goes_on=True)
    with _state_kept():
        try:
            ranks, reason = attempt(prepared, ending, source=resume, argv=["stablelm.train"], started=started)
            code = conclude(ending, ranks, reason)
        except BaseException as error:
            ending.write(getattr(error, "exit_code", 1), str(error) or type(error).__name__)
            close_groups()
            raise
    progress = ending.progress
    return TrainingResult(
        Path(prepared.config.run.dir), code, reason, progress.step, progress.tokens, progress.loss, progress.val_loss
    )


def evaluate(
    checkpoint: Place,
    *,
    data: str | Sequence[str] | Mapping[str, str] = (),
    tasks: Sequence[str] = (),
    sequences: int | None = None,
    limit: int | None = None,
    few_shot: int | None = None,
    tokenizer: str | None = None,
    config: Sequence[Place] = (),
    trust_checkpoint: bool = False,
    average: str | None = None,
    **reading: str,
) -> dict[str, Any]:
    """Loss, perplexity, bits per byte and tasks of a run or checkpoint: what `stablelm eval --out` writes.

    `data`: paths, by name in a mapping; the run's own validation sets if there are neither data nor tasks. `sequences`:
    of each set at most, 0 for all, None for as many as training used. `limit` and `few_shot` are of `tasks`. `config`:
    files of your own configuration. `average`: which weights, as `evaluate.average`. `reading`: text_column, text_unit
    and bad_rows, where they differ from the run's. Raises CheckpointError, ConfigError and DataError.
    """
    from stablelm.evaluate import consent
    from stablelm.evaluate.checkpoint_evaluation import figures, prepare
    from stablelm.evaluate.tasks.task_evaluation import TaskOptions

    _alone("evaluate", "torchrun -m stablelm eval")
    if unknown := sorted(set(reading) - {"text_column", "text_unit", "bad_rows"}):
        raise ConfigError(f"evaluate has no argument {unknown[0]}; text is read by text_column, text_unit and bad_rows")
    named = [data] if isinstance(data, str) else data
    sets = [f"{name}={path}" for name, path in named.items()] if isinstance(named, Mapping) else [*named]
    asked = TaskOptions([*tasks], limit=limit, few_shot=few_shot) if tasks else None
    own = consent.own_configuration([os.fspath(file) for file in config])
    place = expand(os.fspath(checkpoint), "checkpoint=")
    request = prepare(place, sets, tokenizer, sequences, reading, Launch(), own, trust_checkpoint, asked, average)
    from stablelm.engine.process.torch_settings import switches_kept

    with switches_kept():
        found, _ = figures(request, Launch(), lambda line: None)
    return found


def probe(config: Config, *, sequences: int = 2, seq_len: int | None = None) -> dict[str, Any]:
    """Signal and gradient of every layer at initialisation, predicted and measured: what `probe.json` holds.

    `seq_len`: tokens of each of the `sequences`, None for the run's, at most 256. Layers lie in the folder for
    temporary files meanwhile. Raises ConfigError, DataError and StorageError.
    """
    from stablelm.probe.prober import make, prepare

    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        request = prepare(_loaded(config), folder, sequences, seq_len)
        from stablelm.probe.probe_report import as_json

        with _state_kept():
            return as_json(make(request))


def plan(
    config: Config,
    *,
    world_size: int,
    gpu: str | None = None,
    figures: Mapping[str, float] | None = None,
    gpus_per_node: int = 8,
    price: float | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """Memory, collectives, step time, hours and cost of a run on `world_size` GPUs: what `stablelm plan --out` writes.

    `gpu`: a name in the table of accelerators, or of one that `figures` describe, by the names of the command's flags
    (`{"peak_tflops": 990, ...}`). `price`: dollars per GPU-hour. `quick`: no dry run. Raises ConfigError.
    """
    from stablelm.observe.accelerators import chosen
    from stablelm.plan.planner import make
    from stablelm.plan.request import prepare

    flags = {f"--{name.replace('_', '-')}": value for name, value in (figures or {}).items()}
    request = prepare(_loaded(config), world_size, chosen(gpu, flags), gpus_per_node, simulated=not quick, price=price)
    from stablelm.plan.output.figures import as_json

    return as_json(make(request))


def export(
    checkpoint: Place,
    out: Place,
    *,
    format: str = "auto",
    dtype: str = "bf16",
    shard_gb: float = 5.0,
    tokenizer: str | None = None,
    check_tokenizer: str | None = None,
    push: str | None = None,
    trust_checkpoint: bool = False,
    average: str | None = None,
) -> "Exported":
    """Writes the new folder `out`, which transformers, vLLM or llama.cpp load; options as of `stablelm export`.

    Raises CheckpointError, ConfigError and StorageError, with nothing left behind.
    """
    from stablelm.export.writer import ExportRequest
    from stablelm.export.writer import export as write

    return write(
        ExportRequest(
            expand(os.fspath(checkpoint), "checkpoint="),
            Path(expand(os.fspath(out), "out=")),
            format,
            dtype,
            shard_bytes=round(shard_gb * 1e9),
            tokenizer=tokenizer,
            checked=check_tokenizer,
            push=push,
            trusted=trust_checkpoint,
            average=average,
        )
    )


def _loaded(config: Config) -> Loaded:
    """A configuration that may have been put together in Python, checked like one from a file."""
    if not isinstance(config, Config):
        raise ConfigError(f"a configuration is what load_config gives, not {type(config).__name__}")
    found = load([], [], world_size=1, given=values(config), place="config")
    return Loaded(found.config, {}, found.asked)


def _alone(name: str, instead: str) -> None:
    launch = detect()
    if launch.world_size > 1:
        raise ConfigError(
            f"stablelm.{name} runs in one process, and {launch.launcher} started {launch.world_size}; use {instead}"
        )


@contextmanager
def _state_kept() -> Iterator[None]:
    """Puts back what a run changes of its process: signal handlers, random numbers, warnings, settings of torch."""
    import torch

    from stablelm.engine.process.torch_settings import switches_kept
    from stablelm.private_names import compilation_settings_kept
    from stablelm.train.stop import SIGNALS

    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if in_main else {}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings(), compilation_settings_kept(), switches_kept():
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for device in devices:
            torch.cuda.set_device(device)
