"""Runs a program in processes forked from a server that has imported torch, which takes a fresh one four seconds.

Several ranks get torchrun's variables, and as under torchrun one that fails ends the others.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# Third-party modules alone: the program's own are those of the tree under test.
PRELOADED = [
    "numpy",
    "sentencepiece",
    "torch",
    "torch._dynamo",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "yaml",
]
OUTPUTS = ("out", "err")
KILLED_AFTER = 30.0  # seconds that the others get to end by themselves
_started: list[Any] = []


def server() -> ForkServerContext:
    """The context whose processes start with all of PRELOADED imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def adopt(environ: dict[str, str]) -> None:
    """Makes `environ` this process's variables: the server's are those of the first launch."""
    os.environ.clear()
    os.environ.update(environ)
    # Python reads it once, when the server starts.
    sys.path += [folder for folder in environ.get("PYTHONPATH", "").split(os.pathsep) if folder]


def run_forked(
    script: str, arguments: list[str], environ: dict[str, str], *, processes: int, port: int, cwd: Path | None,
    timeout: float,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`python script arguments` to its end, on `processes` ranks if more than one; all ranks share the output.

    The return code is that of the rank that failed first. Raises subprocess.TimeoutExpired; no process is left behind.
    """
    line = [script, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_ranks(
            script, arguments, environ, processes=processes, port=port, cwd=cwd, output=Path(folder)
        )  # fmt: skip
        try:
            code = _wait(ranks, time.monotonic() + timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(line, timeout) from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
        out, err = ((Path(folder) / name).read_text() for name in OUTPUTS)
        return subprocess.CompletedProcess(line, code, out, err)


def start_ranks(
    script: str, arguments: list[str], environ: dict[str, str], *, processes: int, port: int, output: Path,
    cwd: Path | None = None,
) -> list[Any]:  # fmt: skip
    """As `start_forked` for each of so many ranks."""
    environs = [environ if processes == 1 else environ | _launcher(rank, processes, port) for rank in range(processes)]
    return [start_forked(script, arguments, own, cwd=cwd, output=output) for own in environs]


def start_forked(
    script: str, arguments: list[str], environ: dict[str, str], *, output: Path, cwd: Path | None = None
) -> Any:
    """The multiprocessing.Process of `python script arguments`; `output` gets the files out and err, appended to."""
    for name in OUTPUTS:
        (output / name).touch()
    line = ([script, *arguments], environ, str(cwd or Path.cwd()), str(output))
    process = server().Process(target=_program, args=line)
    process.start()
    _started.append(process)
    return process


def kill_started() -> None:
    """Kills what `start_forked` started and still runs, with all that it started in turn, so that no test leaves it."""
    while _started:
        process = _started.pop()
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()


def _launcher(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }


def _wait(ranks: list[Any], deadline: float) -> int:
    code = 0
    while any(process.exitcode is None for process in ranks):
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed and not code:
            code = failed[0]
            deadline = min(deadline, time.monotonic() + KILLED_AFTER)
            for process in ranks:
                process.terminate()
        if time.monotonic() > deadline:
            if code:
                return code
            raise TimeoutError
        time.sleep(0.02)
    return code or next((process.exitcode for process in ranks if process.exitcode), 0)


def _program(line: list[str], environ: dict[str, str], cwd: str, output: str) -> None:
    os.setsid()
    for descriptor, name in zip((1, 2), OUTPUTS, strict=True):
        opened = os.open(f"{output}/{name}", os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    adopt(environ)
    os.chdir(cwd)
    sys.argv, sys.path[0] = line, str(Path(line[0]).parent)
    # Not what multiprocessing made of the server: a program finds itself started by python.
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    runpy.run_path(line[0], run_name="__main__")
