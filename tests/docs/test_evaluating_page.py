"""The commands of docs/evaluating.md run as they are written, on a small run in place of the quickstart."""

import re
import shlex
from pathlib import Path

import pytest
from support.choices import write_items
from support.programs import TINY, run
from support.tiny import TinyCorpus, make_tiny_corpus

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluating.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^(?:python|torchrun) .*$", TEXT, re.MULTILINE)
FROM_THE_HUB = ("hellaswag", "mmlu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the page names."""
    folder = tmp_path_factory.mktemp("page")
    corpus = make_tiny_corpus(folder / "corpus")
    done = run("pretrain", *TINY, *corpus.overrides(), "train.steps=2", "run.dir=runs/quickstart", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "news.txt").write_text("ban der fi gosta. " * 40)
    (folder / "tasks").mkdir()
    definition = re.search(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert definition is not None
    (folder / "tasks" / "words.yaml").write_text(definition[1])
    for name in ("piqa", "arc_easy", "words"):
        write_items(folder / f"{name}.jsonl", 6)
    return folder


def short(words: list[str], folder: Path) -> list[str]:
    """A training command on the small corpus in place of its configuration's."""
    corpus = TinyCorpus(
        folder,
        *(str(folder / "corpus" / path) for path in ("train/*.json.gz", "tiny-validation.json.gz", "tiny.model")),
    )
    kept = [word for word in words if "=" in word and not word.startswith("evaluate.every")]
    return [*TINY, *corpus.overrides(), "train.steps=4", "evaluate.every=2", "run.dir=runs/tasks", *kept]


@pytest.mark.slow
@pytest.mark.parametrize("command", [pytest.param(one, id=one[:70]) for one in COMMANDS])
def test_a_command_runs(command: str, place: Path):
    words = shlex.split(command)
    if any(name in command for name in FROM_THE_HUB):
        pytest.skip("its data are on the hub")
    if "lm_harness" in command or "--task-path" in command:
        pytest.importorskip("lm_eval")
    processes = int(next((word.partition("=")[2] for word in words if word.startswith("--nproc")), "1"))
    at = next(number for number, word in enumerate(words) if word.startswith("launch/"))
    program, arguments = Path(words[at]).stem, words[at + 1 :]
    if program == "pretrain":
        arguments = short(arguments, place)
    cache = str(place / "cache")
    done = run(program, *arguments, processes=processes, cwd=place, HF_DATASETS_CACHE=cache, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
