"""A contestant's process, which the benchmark starts, warms, asks for rounds and ends."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any


class Unavailable(Exception):
    """The contestant's library cannot be imported there."""


class Failed(Exception):
    """The process ended or took too long; the last line that it said."""


class Live:
    """Warm once made. Raises Unavailable and Failed, as `round` does; a context that ends the process."""

    def __init__(
        self,
        python: str,
        name: str,
        settings: dict[str, Any],
        *,
        folder: Path,
        environment: dict[str, str],
        limit: float,
    ):
        self._limit, self._said = limit, folder / "stderr.txt"
        command = [python, "-m", "benchmarks.training.one_process", name, json.dumps(settings)]
        with self._said.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # compilers that it starts end with it
            )
        try:
            self.start = self._answer()
        except BaseException:
            self.end()
            raise

    def round(self) -> dict[str, Any]:
        """Times the next steps: the process's answer, with what its start took."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: the answer says how
            self._process.stdin.write("round\n")
            self._process.stdin.flush()
        return {**self.start, **self._answer()}

    def end(self) -> None:
        self._kill()
        self._process.communicate()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = Timer(self._limit, self._kill)
        timer.start()
        line = self._process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        if late:
            raise Failed(f"no result within {self._limit:g} s")
        found = json.loads(line) if line.startswith("{") else {}
        if "unavailable" in found:
            raise Unavailable(found["unavailable"])
        if not found:
            code = self._process.wait()
            said = self._said.read_text(errors="replace").strip().splitlines()
            raise Failed(said[-1] if said else line.strip() or f"exit code {code}")
        return found

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
