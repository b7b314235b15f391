"""TensorBoard: curves in groups that begin with the loss, layers as images, samples and the configuration as text."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from stablelm.config.schema import Config
from stablelm.new_files import make_folder
from stablelm.observe.sinks.heatmaps import Heatmaps, is_of_layer
from stablelm.observe.sinks.metrics_file import COUNTERS, SAMPLES, storage_error
from stablelm.observe.sinks.run_info import RunInfo

FOLDER = "tensorboard"
# TensorBoard sorts groups by name.
GROUPS = {
    "1_loss": ("loss", "val_loss"),
    "2_evaluation": ("val_bits_per_byte", "val_loss_by_frequency", "task"),
    "3_optimizer": ("lr", "grad_norm", "update_ratio", "sharpness", "skipped_steps", "spikes", "rewinds"),
    "4_throughput": (
        "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "store_wait_seconds", "layers_seconds",
        "slowest_rank", "slowest_rank_seconds",
    ),
    "5_memory": ("memory_bytes",),
    "6_data": ("data_epoch", "skipped_rows", "unknown_tokens"),
    "7_layers": ("embedding", "sigma"),
}  # fmt: skip
LAYERS = "7_layers"
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def tag(name: str) -> str:
    """The name of a metric under which TensorBoard shows it: with its group; those of unknown kinds keep theirs."""
    group = _GROUP_OF.get(name.partition("/")[0])
    return f"{group}/{name}" if group else name


class TensorBoardSink:
    """A scalar for each metric but those of single layers, an image for each kind of these, a text for each sample.

    Events go to `directory/<name>`, so that TensorBoard shows the run by its name; where the directory holds events
    already, they go beside them. `purge_step` makes TensorBoard forget that step and later ones of earlier attempts,
    and `history` are the records before it. Raises StorageError.
    """

    def __init__(
        self, directory: Path, name: str, *, purge_step: int | None = None, history: Iterable[dict[str, Any]] = ()
    ):
        self._directory, self._heatmaps = directory, Heatmaps()
        for record in history:
            self._heatmaps.add(record)
        self._guard(lambda: make_folder(directory))
        self._folder = self._guard(lambda: make_folder(_folder(directory, name)))
        self._open(purge_step)

    def _open(self, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = self._guard(lambda: SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10))

    def text(self, name: str, lines: Iterable[str], step: int = 0) -> None:
        """Shows lines as they are, as Markdown takes them: a block of code."""
        block = "\n".join(f"    {line}" for line in lines)
        self._guard(lambda: self._writer.add_text(name, block, step))

    def write(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in record.items():
            if name not in COUNTERS and isinstance(value, int | float) and not is_of_layer(name):
                self._guard(lambda name=name, value=value: self._writer.add_scalar(tag(name), value, step))
        for number, sample in enumerate(record.get(SAMPLES, ()), 1):
            self.text(f"{SAMPLES}/{number}", (sample["prompt"] + sample["text"]).splitlines(), step)
        self._heatmaps.add(record)
        if self._heatmaps.due:
            self._draw(step)

    def rewound(self, step: int) -> None:
        """The run is at `step` again: TensorBoard forgets what came after it."""
        self._guard(self._writer.close)
        self._heatmaps.forget_after(step)
        self._open(step + 1)

    def close(self, failed: bool = False) -> None:
        if self._heatmaps.pending:
            self._draw(self._heatmaps.last_step)
        self._guard(self._writer.close)

    def _draw(self, step: int) -> None:
        for name, figure in self._heatmaps.draw():
            self._guard(lambda name=name, figure=figure: self._writer.add_figure(f"{LAYERS}/{name}", figure, step))

    def _guard(self, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except OSError as error:
            raise storage_error(self._directory, error) from error


def open_run(info: RunInfo) -> TensorBoardSink:
    """Writes to `run.dir/tensorboard`; the configuration and where it ran are texts of each attempt."""
    # An attempt that died before its first checkpoint is made again from the start.
    purge_step = info.step + 1 if info.recorded else None
    sink = TensorBoardSink(info.directory / FOLDER, info.name, purge_step=purge_step, history=info.history())
    facts = {"name": info.name, "tags": ", ".join(info.tags), "attempt": info.attempt, **info.provenance}
    sink.text("run", (f"{name}: {value}" for name, value in facts.items()), info.step)
    sink.text("config", info.config_text.splitlines(), info.step)
    return sink


def load(config: Config) -> None:
    """Imports the library and what it draws images with, which takes seconds."""
    importlib.import_module("torch.utils.tensorboard")
    if config.observe.layers_every:
        importlib.import_module("matplotlib.pyplot")


def problem(config: Config) -> str:
    """TensorBoard needs no account."""
    return ""


def where(run_dir: str) -> str:
    """A command that shows the curves."""
    return f"tensorboard --logdir {quote(f'{run_dir}/{FOLDER}')}"


def _folder(directory: Path, name: str) -> Path:
    """Where the run's events are, or where new ones go."""
    if not directory.is_dir():
        return directory / name
    holders = sorted({events.parent for events in directory.glob("**/events.out.tfevents.*")})
    return holders[0] if holders else directory / name
