"""One record to every sink: metrics.jsonl first, the loggers, and the console."""

from pathlib import Path
from typing import Any

from stablelm.config.schema import Config
from stablelm.observe.console import Console
from stablelm.observe.progress import Progress
from stablelm.observe.sinks.loggers import open_loggers
from stablelm.observe.sinks.metrics_file import METRICS, MetricsFile
from stablelm.observe.sinks.run_info import Sink


class Records:
    """Writes each record to every sink; silent on ranks above 0."""

    def __init__(self, config: Config, progress: Progress, *, first_rank: bool):
        self._progress = progress
        self._console: Console | None = None
        self._metrics: MetricsFile | None = None
        self._loggers: list[Sink] = []
        if first_rank:
            self._console = Console(total_steps=config.train.steps or 0, first_step=progress.step)
            self._loggers = open_loggers(config, progress, self._console.message)
            self._metrics = MetricsFile(Path(config.run.dir) / METRICS)

    def write(self, record: dict[str, Any]) -> None:
        """`record` holds `step` and metrics by name; the attempt's number is added."""
        if self._metrics is None or self._console is None:
            return
        record = {**record, "attempt": self._progress.attempt}
        for sink in (self._metrics, *self._loggers, self._console):
            sink.write(record)

    def rewound(self) -> None:
        """The run is at an earlier step again."""
        for logger in self._loggers:
            logger.rewound(self._progress.step)

    def message(self, text: str) -> None:
        """A line for the reader at the terminal."""
        if self._console is not None:
            self._console.message(text)

    def close(self, *, failed: bool = False) -> None:
        """`failed`: the attempt does not end by finishing or an agreed stop."""
        for logger in self._loggers:
            logger.close(failed)
        if self._metrics is not None and self._console is not None:
            self._metrics.close()
            self._console.close()
