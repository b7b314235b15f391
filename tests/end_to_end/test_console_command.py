"""`stablelm COMMAND`: every program under its name, quick help, the command in usage and messages."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.programs import TINY, environment
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

import stablelm
from stablelm.programs.command import COMMANDS, main


@pytest.fixture
def begin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs `stablelm ...` in this process and an empty folder; the code and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int | str | None, str]:
        monkeypatch.setattr("sys.argv", ["/somewhere/bin/stablelm", *words])
        try:
            code: int | str | None = main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_every_program_is_a_command():
    programs = {path.stem for path in (REPOSITORY / "stablelm" / "programs").glob("*.py")}
    assert {module for module, _ in COMMANDS.values()} == programs - {"__init__", "arguments", "command"}


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lm-harness"])
def test_usage_names_the_command(begin, command: str):
    code, said = begin(command, "--help")
    assert code == 0
    assert said.startswith(f"usage: stablelm {command} ")
    code, said = begin(command, "--no-such-option", "3")
    assert code == 78
    assert f"see stablelm {command}" in said


def test_mistakes_and_version(begin):
    assert begin("--version") == (0, f"{stablelm.__version__}\n")
    code, said = begin("pretrian", "--config", "x")
    assert code == 78
    assert said.startswith("error: unknown command pretrian, did you mean pretrain? (one of pretrain, node, eval, ")
    assert said.count("\n") == 1
    code, said = begin()
    assert (code, said.count("\n")) == (78, 1)
    code, said = begin("--help")
    assert code == 0
    assert all(f"\n  {name} " in said for name in COMMANDS)


def test_messages_name_the_command(begin, tiny_corpus: TinyCorpus):
    keys = [*TINY, *tiny_corpus.overrides(), "train.steps=1", "run.dir=run"]
    code, said = begin("pretrain", *keys)
    assert code == 0, said
    assert "evaluate: stablelm eval --checkpoint run" in said
    code, said = begin("checkpoints", "list", "run")
    assert code == 0
    assert "step-00000001" in said


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        (["-m", "stablelm", "--help"], 0.5),
        (["-m", "stablelm", "pretrain", "--help"], 0.5),
        (["-m", "stablelm", "checkpoints", "lst"], 0.5),
        (["-m", "stablelm", "pretrain", "--config", "quikstart"], 0.5),
        (["-c", "import stablelm, sys; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"], 0.2),
    ],
)
def test_what_a_user_waits_for(words: list[str], seconds: float):
    """In processor time, which other processes of the machine do not change."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode in (0, 78), done.stderr
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < seconds


@pytest.mark.slow
def test_launchers_start_the_module(tiny_corpus: TinyCorpus, tmp_path: Path):
    keys = [*TINY, *tiny_corpus.overrides(), "train.steps=2", f"run.dir={tmp_path}/run", "engine.kind=ddp"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_endpoint=127.0.0.1:0"]
    done = subprocess.run(
        [*launcher, "--rdzv_backend=c10d", "-m", "stablelm", "pretrain", *keys],
        env=environment(), capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "engine ddp on 2 process(es)" in done.stdout
