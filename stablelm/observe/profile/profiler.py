"""A profiler trace between two steps with its table, and CUDA's memory history, by key."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from stablelm.config.schema import Config, ObserveConfig
from stablelm.new_files import clear, make_folder
from stablelm.observe.profile.advice import suggestions
from stablelm.observe.profile.parts import MARK, STEP, Call, marked
from stablelm.observe.profile.table import as_json, as_text, summarise
from stablelm.observe.profile.timeline import read
from stablelm.observe.sinks import storage_error
from stablelm.private_names import record_memory_history, write_memory_history

Tabulate = Callable[[list[dict[str, Any]], int, int], tuple[str, dict[str, Any]]]
"""From the events of a trace and its first and last step to the table, as text and as plain values."""


def tabulator(config: Config, device: torch.device, rank: int, world_size: int) -> Tabulate:
    """Makes the tables of this rank."""

    def tabulate(events: list[dict[str, Any]], first: int, last: int) -> tuple[str, dict[str, Any]]:
        timeline = read(events, last - first + 1)
        profile = summarise(timeline, first, last, config, device, rank, world_size)
        peak = None
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device) / torch.cuda.get_device_properties(device).total_memory
        found = suggestions(profile, config, peak)
        return as_text(profile, found), as_json(profile, found)

    return tabulate


class Profiler:
    """Traces the steps of `observe.profile` and writes `run.dir/profile/`; does nothing if not asked to.

    Call `step(finished)` after every step, and `close` at the end. The trace starts when the step
    before the first is finished: in the constructor, if the run begins there (`finished` is the step
    it goes on from). While it runs, `calls` are marked by their parts. Files, for each rank:
    `trace-rank<rank>-steps-<first>-<last>.json` (Chrome trace; open in Perfetto), beside it `table-...` as .txt and
    .json if there is `tabulate`, and `memory-rank<rank>.pickle` (open in pytorch.org/memory_viz; with CUDA only).
    """

    def __init__(
        self,
        run_dir: Path,
        observe: ObserveConfig,
        rank: int,
        finished: int = 0,
        *,
        calls: Callable[[], list[Call]] = list,
        tabulate: Tabulate | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ):
        self._directory, self._rank = run_dir / "profile", rank
        self._window = observe.profile
        self._snapshot = observe.memory_snapshot and torch.cuda.is_available()
        self._calls, self._tabulate, self._tell = calls, tabulate, tell
        self._running: torch.profiler.profile | None = None
        self._marks = ExitStack()
        self._step = ExitStack()
        self._traced: tuple[int, int] | None = None
        if self._snapshot:
            record_memory_history(100_000)
        self._start_if_due(finished)

    def step(self, finished: int) -> None:
        """Starts, continues or ends the trace once step `finished` is done."""
        if self._running is not None and self._window is not None and self._traced is not None:
            assert finished == self._traced[1] + 1, "step() is called after every step"
            self._traced = (self._traced[0], finished)
            if finished >= self._window[1]:
                self._end()
            else:
                self._step.close()
                self._running.step()
                self._step.enter_context(record_function(MARK + STEP))
        self._start_if_due(finished)

    def interrupt(self) -> None:
        """Ends a trace that is under way, for steps that will not follow one another. Raises StorageError."""
        self._end()

    def close(self) -> None:
        """Ends a trace that is under way and writes the memory history. Raises StorageError."""
        self._end()
        if self._snapshot:
            self._snapshot = False
            self._write(f"memory-rank{self._rank}.pickle", write_memory_history)
            record_memory_history(None)

    def _start_if_due(self, finished: int) -> None:
        if self._window is None or self._running is not None:
            return
        first, last = self._window
        if first - 1 <= finished < last and self._traced is None:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
                torch.cuda.synchronize()
            self._marks.enter_context(marked(self._calls()))
            # The shapes of matmuls tell their FLOPs.
            self._running = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
            self._running.start()
            self._step.enter_context(record_function(MARK + STEP))
            self._traced = (finished + 1, finished)

    def _end(self) -> None:
        if self._running is None or self._traced is None:
            return
        running, self._running = self._running, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the last step launched is part of it
        self._step.close()
        running.stop()
        self._marks.close()
        first, last = self._traced
        if last >= first:
            name = f"rank{self._rank}-steps-{first}-{last}"
            self._write(f"trace-{name}.json", running.export_chrome_trace)
            self._write_table(name, first, last)

    def _write_table(self, name: str, first: int, last: int) -> None:
        if self._tabulate is None:
            return
        trace = (self._directory / f"trace-{name}.json").read_text(encoding="utf-8", errors="replace")
        text, figures = self._tabulate(json.loads(trace)["traceEvents"], first, last)
        self._write(f"table-{name}.txt", lambda path: Path(path).write_text(text, encoding="utf-8"))
        self._write(f"table-{name}.json", lambda path: Path(path).write_text(json.dumps(figures, indent=1) + "\n"))
        self._tell(text)

    def _write(self, name: str, write) -> None:
        try:
            clear(make_folder(self._directory) / name)
            write(str(self._directory / name))
        except OSError as error:
            raise storage_error(self._directory / name, error) from error
