"""What a reader sees: a plain line for each record in a log, a progress bar on a terminal.

The bar is rich's. The lines are our own: off a terminal rich 15.0 prints a bar once, at its end.
"""

import math
import sys
import time
from typing import Any, TextIO

from stablelm.printable import printable
from stablelm.redaction import redacted


class Console:
    """Prints training records and messages to `stream` (default: standard output).

    On a terminal a bar with step, loss, tokens/s and the remaining time stays below the messages; elsewhere
    each record is one line, so that the log of a requeued job can be read.
    """

    def __init__(self, total_steps: int, first_step: int = 0, stream: TextIO | None = None):
        self._total, self._first = total_steps, first_step
        self._stream = stream or sys.stdout
        self._started = time.monotonic()
        self._bar = _Bar(total_steps, first_step, self._stream) if self._stream.isatty() else None

    def write(self, record: dict[str, Any]) -> None:
        """Shows a record; validation losses are messages on a terminal, too, since they should stay."""
        if "loss" not in record:
            if losses := validation_words(record):
                self.message(f"step {record['step']}/{self._total}  {losses}")
            return
        remaining = self._seconds_remaining(record["step"])
        if self._bar is None:
            self.message(training_words(record, self._total, remaining))
        else:
            self._bar.show(record, remaining)

    def message(self, text: str) -> None:
        """Prints lines that stay."""
        text = printable(redacted(text))
        if self._bar is not None:
            self._bar.message(text)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _seconds_remaining(self, step: int) -> float | None:
        done = step - self._first
        return (time.monotonic() - self._started) / done * (self._total - step) if done > 0 else None


def training_words(record: dict[str, Any], total: int, remaining: float | None) -> str:
    """`step 120/400  loss 5.1234  lr 3.0e-04  grad_norm 0.81  12.3k tokens/s  data 0.4%  remaining 2m10s`."""
    words = [f"step {record['step']}/{total}", f"loss {record['loss']:.4f}"]
    if "lr" in record:
        words.append(f"lr {record['lr']:.1e}")
    if "grad_norm" in record:
        words.append(f"grad_norm {record['grad_norm']:.2f}")
    if record.get("skipped_steps"):
        words.append(f"skipped {record['skipped_steps']}")
    if record.get("skipped_rows"):
        words.append(f"bad rows {record['skipped_rows']}")
    if "tokens_per_second" in record:
        words.append(f"{short_number(record['tokens_per_second'])} tokens/s")
    if "slowest_rank" in record:
        words.append(f"slowest rank {record['slowest_rank']} on {record['slowest_host']}")
    if record.get("step_seconds") and "data_wait_seconds" in record:
        words.append(f"data {record['data_wait_seconds'] / record['step_seconds']:.1%}")
    if remaining is not None:
        words.append(f"remaining {short_time(remaining)}")
    return "  ".join(words)


def validation_words(record: dict[str, Any]) -> str:
    """`val_loss/default 4.5678`, one for each validation set."""
    return "  ".join(f"{name} {value:.4f}" for name, value in record.items() if name.startswith("val_loss/"))


def short_number(value: float) -> str:
    """Three figures: 950, 12.3k, 1.23M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:#.3g}".rstrip(".") + unit
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """Two units: 45s, 2m10s, 3h05m, 2d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class _Bar:
    """A rich progress bar with our figures."""

    def __init__(self, total: int, first: int, stream: TextIO):
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        figures = TextColumn("{task.fields[figures]}", markup=False)
        # Prints of others go above the bar.
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            figures,
            console=RichConsole(file=stream),
            redirect_stdout=stream is sys.stdout,
            redirect_stderr=stream is sys.stdout,
        )
        self._task = self._progress.add_task("", total=total, completed=first, figures="")
        self._progress.start()
        # A process that ends without close() must not leave a terminal without its cursor.
        self._progress.console.show_cursor(True)

    def show(self, record: dict[str, Any], remaining: float | None) -> None:
        words = [f"loss {record['loss']:.4f}"]
        if "tokens_per_second" in record:
            words.append(f"{short_number(record['tokens_per_second'])} tokens/s")
        if remaining is not None:
            words.append(f"remaining {short_time(remaining)}")
        self._progress.update(self._task, completed=record["step"], figures="  ".join(words))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
