"""The commands of docs/outside_slurm.md: the one that needs no cluster is run, the others name files and options."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from support.pages import DOCS, KEY, blocks, commands
from support.programs import TINY, environment, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

PAGE = DOCS / "outside_slurm.md"


def test_a_host_of_its_own_trains(tiny_corpus: TinyCorpus, tmp_path: Path):
    (line,) = commands(PAGE)
    words = shlex.split(line.replace("--processes 8", "--processes 1").replace("--config data/c4.yaml", ""))
    keys = [word for word in words if KEY.match(word) and not word.startswith("data.")]
    words = [str(REPOSITORY / word) if (REPOSITORY / word).is_file() else word for word in words if not KEY.match(word)]
    small = [*TINY, *tiny_corpus.overrides(), "train.precision=fp32", "train.steps=2"]
    done = subprocess.run(
        [sys.executable, *words[1:], *small, *keys], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "runs/mine")["exit_code"] == 0


def test_the_other_commands_name_what_there_is():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:deploy|configs|data|launch)/[\w.-]+(?:/[\w.-]+)*\.(?:sh|yaml|py)", text))
    assert {"deploy/ssh.sh", "deploy/kubernetes.yaml", "deploy/skypilot.yaml", "launch/node.py"} <= named
    assert all((REPOSITORY / name).is_file() for name in named)
    (loop,) = blocks(PAGE, "bash")
    subprocess.run(["bash", "-n"], input=loop, text=True, check=True)
    assert "--env BUCKET=" in text and "BUCKET: null" in (REPOSITORY / "deploy/skypilot.yaml").read_text()
    assert "ARG CUDA=13.0" in (REPOSITORY / "Dockerfile").read_text()
