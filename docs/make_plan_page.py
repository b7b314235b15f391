"""Runs every command of docs/planning.md that starts with `$ python launch/plan.py` and puts its output below it."""

import contextlib
import io
import os
import re
import runpy
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "planning.md"
BLOCK = re.compile(r"```\n\$ (python launch/plan\.py .*)\n(?:.*\n)*?```\n")


def commands(page: str) -> list[str]:
    """The commands whose output the page shows."""
    return [match[1] for match in BLOCK.finditer(page)]


def output(command: str) -> str:
    """What a command prints, run here."""
    main = runpy.run_path(str(REPOSITORY / "launch" / "plan.py"))["main"]
    told = io.StringIO()
    with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(told):
        code = main(shlex.split(command)[2:])
    assert code == 0, f"{command} ended with {code}"
    return told.getvalue()


def filled(page: str) -> str:
    """The page with every output made anew."""
    return BLOCK.sub(lambda match: f"```\n$ {match[1]}\n{output(match[1])}```\n", page)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    PAGE.write_text(filled(PAGE.read_text()))
