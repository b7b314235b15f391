"""Options of every program: mistakes end with 78 and name the nearest, `~` is the home directory, `$` is refused."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.programs import TINY
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

PROGRAMS = [
    "launch/pretrain.py", "launch/eval.py", "launch/probe.py", "launch/plan.py", "launch/checkpoints.py",
    "launch/import_model.py",
    "data/prepare.py", "data/preview.py", "data/train_tokenizer.py", "slurm/attempt.py", "slurm/preflight.py",
]  # fmt: skip
COMMANDS = {
    "launch/checkpoints.py": ["list", "verify", "prune", "consolidate"],
    "slurm/attempt.py": ["where", "unfinished", "line", "begin", "end", "tell", "state", "unevaluated"],
}
WORDS = {
    "--text-column",
    "--eos-token",
    "--part",
    "--gpu",
    "--world-sizes",
    "--reason",
    "--launcher",
    "--method",
    "--keep-best",
    "--average",
    "--coordinates",
}
"""Options that take words of the user's own which are no path."""
HOME_PATHS = [
    ("launch/checkpoints.py", ["list", "~/run"]),
    ("launch/checkpoints.py", ["verify", "~/run"]),
    ("launch/checkpoints.py", ["prune", "~/run", "--keep", "1"]),
    ("launch/eval.py", ["--checkpoint", "~/run"]),
    ("launch/import_model.py", ["--from", "~/run", "--out", "x"]),
    ("launch/pretrain.py", ["--config", "~/run"]),
    ("launch/pretrain.py", [*TINY, "--resume", "~/run"]),
    ("launch/pretrain.py", [*TINY, "run.init_from=~/run"]),
    ("launch/pretrain.py", [*TINY, "data.tokenizer=~/run"]),
    ("launch/pretrain.py", [*TINY, "data.path=~/run"]),
    ("launch/pretrain.py", [*TINY, "data.path=[~/run]"]),
    ("launch/pretrain.py", [*TINY, "data.validation.x=~/run"]),
    ("launch/pretrain.py", [*TINY, "data.mixture.x={path: ~/run, weight: 1}"]),
    ("launch/probe.py", ["--config", "~/run"]),
    ("launch/plan.py", ["--world-size", "1", "--config", "~/run"]),
    ("launch/plan.py", ["--world-size", "1", "train.steps=1", "data.tokenizer=~/run"]),
    ("data/preview.py", ["--config", "~/run"]),
    ("data/prepare.py", ["--source", "x", "--tokenizer", "~/run", "--out", "x"]),
    ("data/train_tokenizer.py", ["--source", "~/run", "--vocab-size", "400", "--out", "x"]),
]


def module(program: str) -> ModuleType:
    name = f"program_{Path(program).stem}"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / program)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def begin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a program in this process, in an empty folder, with a home of its own; the code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def run(program: str, *arguments: str) -> tuple[int, str]:
        main = module(program).main
        code: Any = 1
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code
        told = capsys.readouterr()
        return code, told.out + told.err

    return run


Begin = Callable[..., tuple[int, str]]


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_unknown_option(begin: Begin, program: str):
    code, said = begin(program, "--no-such-option", "3")
    assert code == 78
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert begin(program, "--help")[0] == 0


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("launch/pretrain.py", ["--confg", "a.yaml"], "unknown option --confg, did you mean --config?"),
        ("launch/pretrain.py", ["--resmue=auto"], "unknown option --resmue, did you mean --resume?"),
        (
            "launch/pretrain.py",
            ["--train.lr=3"],
            "unknown option --train.lr, did you mean train.lr=...? keys are written",
        ),
        ("launch/pretrain.py", ["--train.stpes=3"], "unknown option --train.stpes, did you mean train.steps=...? keys"),
        ("launch/pretrain.py", ["--lr", "3"], "unknown option --lr, did you mean train.lr=...? keys are written"),
        ("launch/pretrain.py", ["-x"], "error: unknown option -x; see"),
        ("launch/pretrain.py", ["--confg", "a", "--resmue", "b"], "--config?; unknown option --resmue, did you mean"),
        ("launch/eval.py", ["--checkpoint", "x", "--dta", "y"], "unknown option --dta, did you mean --data?"),
        ("launch/eval.py", ["--checkpoint", "x", "y"], "unexpected argument y"),
        ("launch/eval.py", ["--checkpoint", "x", "--sequences", "many"], "invalid int value: 'many'"),
        ("launch/plan.py", ["--worldsize", "3"], "--world-size"),
        ("launch/import_model.py", ["--form", "x", "--out", "y"], "--from"),
        ("launch/checkpoints.py", ["lst", "x"], "unknown command lst, did you mean list? (one of list, verify"),
        ("launch/checkpoints.py", [], "required: command"),
        ("launch/checkpoints.py", ["prune", "x", "--kep", "1"], "unknown option --kep, did you mean --keep?"),
        ("slurm/attempt.py", ["begn", "x"], "unknown command begn, did you mean begin?"),
        ("slurm/attempt.py", ["end", "x", "--rc", "0", "--reson", "y"], "did you mean --reason?"),
        (
            "data/train_tokenizer.py",
            ["--source", "x", "--out", "y", "--vocab-size", "9", "--model-type", "bpee"],
            "unknown --model-type bpee, did you mean bpe? (one of unigram, bpe)",
        ),
    ],
)
def test_the_nearest_is_named(begin: Begin, program: str, arguments: list[str], words: str):
    code, said = begin(program, *arguments)
    assert code == 78
    assert words in said
    assert said.count("error: ") == 1


def options_of(begin: Begin, program: str) -> list[list[str]]:
    """Every option that takes a value, after its command."""
    found = []
    for command in COMMANDS.get(program, [""]):
        start = [command] if command else []
        usage = begin(program, *start, "--help")[1].split("\n\n")[0]
        found += [[*start, option] for option in re.findall(r"(--[a-z-]+) [^\]\s|]", usage)]
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_that_takes_a_path_refuses_variables(begin: Begin, program: str):
    """An option that takes any text is a path, or is listed above."""
    for option in options_of(begin, program):
        code, said = begin(program, *option, "${DATA}/x")
        assert code == 78, option
        if option[-1] not in WORDS:
            assert "holds a $" in said or "invalid" in said or "did you mean" in said or "(one of" in said, (
                option,
                said,
            )


@pytest.mark.parametrize(("program", "arguments"), HOME_PATHS)
def test_the_home_directory_is_meant(
    begin: Begin, program: str, arguments: list[str], tmp_path: Path, tiny_corpus: TinyCorpus
):
    if TINY[0] in arguments:
        mixed = any(word.startswith("data.mixture") for word in arguments)
        corpus = [key for key in tiny_corpus.overrides() if not (mixed and key.startswith("data.path"))]
        arguments = [*corpus, *arguments]
    code, said = begin(program, *arguments)
    assert code == 78, said
    assert f"{tmp_path}/home/run" in said
    assert not (tmp_path / "~").exists()
    code, said = begin(program, *[word.replace("~", "$HOME") for word in arguments])
    assert code == 78, said
    assert "holds a $" in said and "write ~/run" in said


def test_one_rank_tells(begin: Begin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert begin("launch/pretrain.py", "--confg", "x") == (78, "")


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("generate", ["--checkpoint", "x", "--prompt", "y"]),
        ("export", ["--checkpoint", "x", "--out", "y"]),
        ("import", ["--from", "x", "--out", "y"]),
    ],
)
def test_programs_of_one_process_refuse_a_launcher(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, program: str, arguments: list[str]
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    script = {"import": "launch/import_model.py"}.get(program, f"launch/{program}.py")
    for started, shown in {str(REPOSITORY / script): f"python {script}", "stablelm": f"stablelm {program}"}.items():
        monkeypatch.setattr("sys.argv", [started])
        code, said = begin(script, *arguments)
        assert code == 78
        assert said == f"error: {program} runs in one process, and torchrun started 2; start it by {shown}\n"
