"""How an attempt ends: `summary.json`, an exit code, and the reason, which one rank reports for all."""

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from stablelm.engine.launch_environment import Launch
from stablelm.errors import EXIT_RANK_LOST, UserError
from stablelm.observe.progress import Progress
from stablelm.process_exit import OTHERS_WAIT_SECONDS, end_at_once, report
from stablelm.redaction import redacted
from stablelm.supervise.attempts import write_summary
from stablelm.supervise.heartbeat import Watchdog


@dataclasses.dataclass
class Ending:
    """What `summary.json` will hold, and the watchdog once there is a run directory."""

    run_dir: str
    launch: Launch
    progress: Progress
    created: bool = False
    watchdog: Watchdog | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    process_goes_on: bool = False
    """Whether the process is a notebook or another program, which outlives the run."""
    closing: Callable[[], None] = lambda: None
    """What this rank does once summary.json is written."""

    def write(self, code: int, reason: str) -> None:
        """Writes the summary, if there is a run directory to write it to."""
        if not self.created:
            return
        fields = dataclasses.asdict(self.progress)
        summary = {"exit_code": code, "reason": reason, "attempts": fields.pop("attempt"), **fields, **self.extra}
        try:
            write_summary(self.run_dir, summary)
        except OSError as error:
            print(f"warning: summary.json cannot be written ({error.strerror})", flush=True)

    def at_once(self, code: int) -> None:
        """Before a repeated signal ends the process; raises KeyboardInterrupt if the process is to go on."""
        self.write(code, "second signal")
        if self.process_goes_on:
            raise KeyboardInterrupt

    def fail(self, error: Exception) -> int:
        """Reports why, unless another rank does, and makes all ranks end; returns the exit code of this one."""
        if isinstance(error, UserError):
            self._report_once(error.exit_code, str(error), lambda: self._print(error))
            self.closing()
            return self._leave(error.exit_code)
        if lost_a_peer(error):
            # The rank that failed reports why; its peers only end with it.
            time.sleep(OTHERS_WAIT_SECONDS)
            if self.watchdog is not None:
                self.watchdog.lost()
            else:
                words = f"rank {self.launch.rank} lost another rank: {str(error).splitlines()[0]}"
                print(words, file=sys.stderr, flush=True)
                self.write(EXIT_RANK_LOST, words)
            return self._leave(EXIT_RANK_LOST)
        self._report_once(1, f"{type(error).__name__}: {error}", _print_traceback)
        return self._leave(1)

    def _report_once(self, code: int, reason: str, print_error: Callable[[], None]) -> None:
        if self.watchdog is not None and not self.watchdog.may_report():
            return
        print_error()
        self.write(code, reason)
        if self.watchdog is not None:
            self.watchdog.reported()

    def _print(self, error: UserError) -> None:
        if self.watchdog is None:
            return report(error, self.launch.rank)
        rank = self.launch.rank
        print(f"{f'rank {rank}: ' if rank else ''}error: {error}", file=sys.stderr, flush=True)

    def _leave(self, code: int) -> int:
        if self.launch.world_size > 1:
            # Peers wait in a collective that never completes: an orderly exit would wait with them.
            end_at_once(code)
        return code


def _print_traceback() -> None:
    print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)


def lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank has ended or does not answer."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Timed out", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
