"""A contestant's process, which the benchmark starts, warms, asks for rounds and ends."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.training.shape import Shape

REPOSITORY = Path(__file__).resolve().parents[2]


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


def add_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """What `start` reads."""
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--warm-up", type=int, default=1, help="steps after the first that are not timed")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of a round")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a start or a round may take")


def start(
    python: str,
    name: str,
    shape: Shape,
    options: argparse.Namespace,
    cache: Path,
    *,
    compiled: bool,
    cold: bool,
    matmuls: bool = True,
) -> Live:
    """The contestant `name`, warm; compiled code is kept in `cache`, which is emptied first if `cold`."""
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    settings = {
        "shape": str(shape),
        "vocab_size": options.vocab,
        "precision": options.precision,
        "cold": cold,
        "compiled": compiled,
        "matmuls": matmuls,
        "device": options.device,
        "warm_up": options.warm_up,
        "steps": options.steps,
        "started": time.monotonic(),
    }
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "TRITON_CACHE_DIR": f"{cache}/triton",
    }
    return Live(python, name, settings, folder=cache, environment=environment, limit=options.timeout)
