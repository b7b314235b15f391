"""Where records go: metrics.jsonl, TensorBoard and the console, on rank 0 alone."""

from pathlib import Path
from typing import Any

from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.observe.console import Console
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import MetricsFile, TensorBoardSink


class Records:
    """Writes each record to every sink; silent on ranks above 0."""

    def __init__(self, config: Config, ranks: Ranks, progress: Progress):
        self._progress, self._run_dir = progress, Path(config.run.dir)
        self._sinks: list[MetricsFile | TensorBoardSink | Console] = []
        self._console: Console | None = None
        if ranks.is_first:
            self._console = Console(total_steps=config.train.steps or 0, first_step=progress.step)
            self._sinks = [
                MetricsFile(self._run_dir / "metrics.jsonl"),
                TensorBoardSink(self._run_dir / "tensorboard", purge_step=progress.step + 1 if progress.step else None),
                self._console,
            ]

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds `step` and metrics by name; the attempt's number is added."""
        for sink in self._sinks:
            sink.write({**record, "attempt": self._progress.attempt})

    def rewound(self) -> None:
        """The run stands at an earlier step again: TensorBoard forgets what came after it."""
        self._sinks = [self._reopened(sink) if isinstance(sink, TensorBoardSink) else sink for sink in self._sinks]

    def _reopened(self, sink: TensorBoardSink) -> TensorBoardSink:
        sink.close()
        return TensorBoardSink(self._run_dir / "tensorboard", purge_step=self._progress.step + 1)

    def message(self, text: str) -> None:
        """A line for the reader at the terminal."""
        if self._console is not None:
            self._console.message(text)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
