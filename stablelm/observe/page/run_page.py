"""Makes the page of a run: on request, and during a run at its evaluations without holding it up."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stablelm.new_files import replace_file
from stablelm.observe.page.template import page_template
from stablelm.observe.provenance import versions

NAME = "report.html"
SHARE = 0.01
"""A page is left out while it would take more than this share of the time since the last one."""
FIRST_SECONDS, BYTES_PER_SECOND = 0.3, 20e6
"""What a page is expected to take: as long as the last one, and what there is to read at this rate."""


def make_page(run_dir: Path, out: Path) -> int:
    """Writes the page of a run in one step, whatever of the run is missing or damaged; returns its size, bytes.

    Raises ConfigError for what is not a run directory, OSError where `out` cannot be written.
    """
    from stablelm.observe.page.metrics_reader import MetricsReader

    return _write(run_dir, MetricsReader(run_dir / "metrics.jsonl"), out, running=False)


class RunPage:
    """The page `run_dir/report.html` of a run that is going on; `enabled`: this rank makes it.

    It never stops the run: the first failure is reported by `message`. `clock` gives seconds.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        enabled: bool,
        message: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir, self._enabled, self._message, self._clock = Path(run_dir), enabled, message, clock
        self._reader: Any = None
        self._seconds, self._made, self._failed = FIRST_SECONDS, clock(), False

    def refresh(self) -> None:
        """Makes the page, unless that would take more than `SHARE` of the time since it was made."""
        if self._enabled and self._expected() <= SHARE * (self._clock() - self._made):
            self._make(running=True)

    def finish(self) -> None:
        """Makes the last page, once summary.json says how the run ended."""
        if self._enabled:
            self._make(running=False)

    def _expected(self) -> float:
        return self._seconds + self._records().unread_bytes() / BYTES_PER_SECOND

    def _records(self) -> Any:
        if self._reader is None:
            from stablelm.observe.page.metrics_reader import MetricsReader

            self._reader = MetricsReader(self._run_dir / "metrics.jsonl")
        return self._reader

    def _make(self, *, running: bool) -> None:
        started = self._clock()
        try:
            _write(self._run_dir, self._records(), self._run_dir / NAME, running=running)
        except Exception as error:  # whatever it is, the run matters more
            if not self._failed:
                self._message(
                    f"warning: {self._run_dir / NAME} cannot be made ({error}); training continues without it"
                )
            self._failed = True
        self._made = self._clock()
        self._seconds = self._made - started


def _write(run_dir: Path, reader: Any, out: Path, *, running: bool) -> int:
    from stablelm.observe.page.contents import contents
    from stablelm.observe.page.run_files import read_run

    files = read_run(run_dir)
    try:
        reader.update()
    except FileNotFoundError:
        pass
    except OSError as error:
        files.problems.append(f"metrics.jsonl cannot be read ({error.strerror}).")
    page = _rendered(contents(files, reader, running=running)).encode(errors="replace")
    replace_file(out, page)
    return len(page)


def _rendered(shown: Any) -> str:
    template, style, policy = page_template(Path(__file__).parent, "page.html")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return template.render(run=shown, style=style, policy=policy, made=made, version=versions()["stablelm"] or "")
