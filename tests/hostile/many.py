"""Runs many programs one after the other, each in a process forked from one that has imported them: a script.

`many.py JOBS.json RESULTS.json`: jobs are a list of [script, argument, ...]; results a list of [exit code or null,
output, errors, seconds, peak bytes].
"""

import importlib
import json
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

IMPORTED = [
    *("stablelm.train.run", "stablelm.process_exit", "stablelm.evaluate.checkpoint_evaluation", "stablelm.data.loader"),
    *("stablelm.checkpoint.contents", "stablelm.train.evaluation", "fsspec", "deepspeed"),
]
ADDRESS_SPACE = 12 << 30  # of which torch maps some before it is used


def run(line: list[str], folder: Path, seconds: float) -> list:
    out, err = folder / "out", folder / "err"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(line, out, err)
    code, peak = _wait(child, started + seconds)
    took = time.monotonic() - started
    return [code, *(path.read_text(errors="replace") for path in (out, err)), took, peak]


def _become(line: list[str], out: Path, err: Path) -> None:
    os.setsid()
    for descriptor, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    resource.setrlimit(resource.RLIMIT_DATA, (ADDRESS_SPACE, ADDRESS_SPACE))
    code = 0
    try:
        sys.argv, sys.path[0] = line, str(Path(line[0]).parent)
        runpy.run_path(line[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, deadline: float) -> tuple[int | None, int]:
    while time.monotonic() < deadline:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss << 10
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return None, usage.ru_maxrss << 10


def main(jobs: str, results: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        done = [run(line, Path(folder), seconds=10.0) for line in json.loads(Path(jobs).read_text())]
    Path(results).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
