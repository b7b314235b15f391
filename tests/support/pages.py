"""The commands of a page of the documentation, run as they are written, in a folder that holds what the page names."""

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from support.forked import run_forked
from support.programs import TINY, environment, free_port
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

DOCS = REPOSITORY / "docs"
KEY = re.compile(r"[a-z_]+(\.[\w-]+)+=")
CACHES = {"HF_HOME": "hub", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}


def commands(page: Path) -> list[str]:
    """The lines of code blocks, joined where they end with a backslash, without comments."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    blocks = [*re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL), *re.findall(r"^ {4}.*$", text, re.M)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [
        line
        for line in lines
        if re.match(r"(\S+=\S+ )*(make|python|\S*/python|accelerate|torchrun|sbatch|stablelm)\s", line)
    ]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page that are marked with that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run_command(
    line: str, folder: Path, corpus: TinyCorpus, *short: str, here: Mapping[str, str] | None = None, **extra: str
) -> subprocess.CompletedProcess[str]:
    """A command `python PROGRAM ...` or `torchrun --nproc_per_node=N PROGRAM ...`; the caller checks the return code.

    It runs in `folder`, where the page's relative paths are; `here`: what stands in the place of other words or parts
    of words, such as absolute paths. A training run gets the tiny corpus and model in the place of its configuration's,
    then its own keys, then `short`. The hub is out of reach unless `extra` says otherwise.
    """
    for words, place in (here or {}).items():
        line = line.replace(words, place)
    words = shlex.split(line)
    at = next(number for number, word in enumerate(words) if word.endswith(".py"))
    processes = re.search(r"--nproc_per_node[= ](\d+)", line)
    program, arguments = REPOSITORY / words[at], words[at + 1 :]
    if program.name == "pretrain.py":
        keys = [word for word in arguments if KEY.match(word)]
        rest = [str(REPOSITORY / word) if word.startswith("configs/") else word for word in arguments]
        imported = any(word.endswith("config.yaml") for word in rest)  # it has a shape and a tokenizer
        small = [key for key in [*TINY, *corpus.overrides()] if not (imported and re.match(r"model|data\.tok", key))]
        arguments = [*(word for word in rest if word not in keys), *small, *keys, *short]
    return _forked(program, arguments, folder, extra, processes=int(processes[1]) if processes else 1)


def run_code(code: str, folder: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """A block of Python of a page, in a process of its own in `folder`."""
    script = folder / "block.py"
    script.write_text(code)
    return _forked(script, [], folder, extra)


def _forked(
    program: Path, arguments: list[str], folder: Path, extra: Mapping[str, str], *, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    caches = {name: str(folder / "cache" / place) for name, place in CACHES.items()}
    environ = environment(**{"HF_HUB_OFFLINE": "1", **caches, **extra})
    return run_forked(
        str(program), arguments, environ, processes=processes, port=free_port(), cwd=folder, timeout=240
    )  # fmt: skip
