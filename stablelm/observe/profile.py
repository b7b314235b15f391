"""A profiler trace between two steps, and CUDA's memory history, by key."""

from pathlib import Path

import torch

from stablelm.config.schema import ObserveConfig
from stablelm.new_files import clear, make_folder
from stablelm.observe.sinks import storage_error
from stablelm.private_names import record_memory_history, write_memory_history


class Profiler:
    """Traces the steps of `observe.profile` and writes `run.dir/profile/`; does nothing if not asked to.

    Call `step(finished)` after every step, and `close` at the end. The trace starts when the step
    before the first is finished: in the constructor, if the run begins there (`finished` is the step
    it goes on from). Files, for each rank:
    `trace-rank<rank>-steps-<first>-<last>.json` (Chrome trace; open in Perfetto) and
    `memory-rank<rank>.pickle` (open in pytorch.org/memory_viz; with CUDA only).
    """

    def __init__(self, run_dir: Path, observe: ObserveConfig, rank: int, finished: int = 0):
        self._directory, self._rank = run_dir / "profile", rank
        self._window = observe.profile
        self._snapshot = observe.memory_snapshot and torch.cuda.is_available()
        self._running: torch.profiler.profile | None = None
        self._traced: tuple[int, int] | None = None
        if self._snapshot:
            record_memory_history(100_000)
        self._start_if_due(finished)

    def step(self, finished: int) -> None:
        """Starts, continues or ends the trace once step `finished` is done."""
        if self._running is not None and self._window is not None and self._traced is not None:
            assert finished == self._traced[1] + 1, "step() is called after every step"
            self._traced = (self._traced[0], finished)
            self._running.step()
            if finished >= self._window[1]:
                self._end()
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
            self._running = torch.profiler.profile(activities=activities, profile_memory=True)
            self._running.start()
            self._traced = (finished + 1, finished)

    def _end(self) -> None:
        if self._running is None or self._traced is None:
            return
        running, self._running = self._running, None
        running.stop()
        first, last = self._traced
        if last >= first:
            self._write(f"trace-rank{self._rank}-steps-{first}-{last}.json", running.export_chrome_trace)

    def _write(self, name: str, write) -> None:
        try:
            clear(make_folder(self._directory) / name)
            write(str(self._directory / name))
        except OSError as error:
            raise storage_error(self._directory / name, error) from error
