"""Where records go: metrics.jsonl, TensorBoard and the console, on rank 0 alone."""

from pathlib import Path
from typing import Any

from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.observe.console import Console
from stablelm.observe.sinks import MetricsFile, TensorBoardSink
from stablelm.train.progress import Progress


class Records:
    """Writes each record to every sink; silent on ranks above 0."""

    def __init__(self, config: Config, ranks: Ranks, progress: Progress):
        self._attempt = progress.attempt
        self._sinks: list[MetricsFile | TensorBoardSink | Console] = []
        self._console: Console | None = None
        if ranks.is_first:
            run_dir = Path(config.run.dir)
            self._console = Console(total_steps=config.train.steps or 0, first_step=progress.step)
            self._sinks = [
                MetricsFile(run_dir / "metrics.jsonl"),
                TensorBoardSink(run_dir / "tensorboard", purge_step=progress.step + 1 if progress.step else None),
                self._console,
            ]

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds `step` and metrics by name; the attempt's number is added."""
        for sink in self._sinks:
            sink.write({**record, "attempt": self._attempt})

    def message(self, text: str) -> None:
        """A line for the reader at the terminal."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
