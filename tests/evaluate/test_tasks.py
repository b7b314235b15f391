"""`eval --tasks`: our reader and lm-evaluation-harness agree to all digits, in any world size; refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.choices import TASK, write_items
from support.programs import run
from support.samples import shared_data
from support.tiny import TinyCorpus


def definition(folder: Path, name: str, path: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, path=path))


def tasks_of(checkpoint: Path, out: Path, *extra: str, processes: int = 1, cache: Path) -> dict[str, Any]:
    arguments = ("--checkpoint", str(checkpoint), "--out", str(out), *extra)
    done = run("eval", *arguments, processes=processes, HF_DATASETS_CACHE=str(cache), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert told["sets"] == {}
    assert all(f"{name}:  acc {figures['acc']:.4f}" in done.stdout for name, figures in told["tasks"].items())
    return told["tasks"]


def compare(trained: Path, folder: Path, items: dict[str, Path], *extra: str) -> None:
    """Our reader and the harness on one and on two processes."""
    for name, path in items.items():
        definition(folder / "definitions", name, path)
    own = ("--tasks", ",".join(f"{name}={path}" for name, path in items.items()), *extra)
    theirs = ("--tasks", ",".join(items), "--task-path", str(folder / "definitions"), *extra)
    found = [
        tasks_of(trained, folder / f"{number}-{processes}.json", *arguments, processes=processes, cache=folder)
        for number, arguments in enumerate((own, theirs))
        for processes in (1, 2)
    ]
    assert set(found[0]) == set(items)
    assert all(set(figures) >= {"acc", "acc_norm", "stderr", "n"} for figures in found[0].values())
    assert found[0] == found[1] == found[2] == found[3]


def test_own_reader_and_lm_eval_agree_in_any_world_size(trained: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    compare(trained, tmp_path, {"words": write_items(tmp_path / "items.jsonl")})


@pytest.mark.slow
def test_piqa_and_arc_easy_agree(trained: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    items = {name: shared_data(f"eval/{name}.jsonl") for name in ("piqa", "arc_easy")}
    compare(trained, tmp_path, items, "--limit", "150", "--batch-size", "16")


def test_text_and_tasks_together(trained: Path, tiny_corpus: TinyCorpus, tmp_path: Path):
    items = write_items(tmp_path / "words.jsonl", 5)
    out = tmp_path / "out.json"
    arguments = ("--tasks", str(items), "--data", f"news={tiny_corpus.validation}", "--limit", "3", "--out", str(out))
    done = run("eval", "--checkpoint", str(trained), *arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    assert (list(told["sets"]), list(told["tasks"]), told["tasks"]["words"]["n"]) == (["news"], ["words"], 3)
    assert "do not fit into the model's 32 tokens" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "a.jsonl,b/a.jsonl"], "names a twice"),
        (["--tasks", "a.jsonl,"], "empty name"),
        (["--tasks", "a=b.json"], "give NAME=FILE.jsonl"),
        (["--tasks", "no.jsonl"], "no.jsonl does not exist"),
        (["--tasks", "a.jsonl", "--limit", "0"], "--limit 0 must be at least 1"),
        (["--tasks", "a.jsonl", "--few-shot", "2"], "--few-shot 2 is for tasks of lm-evaluation-harness"),
        (["--tasks", "piqa", "--task-path", "nowhere"], "--task-path nowhere is not a directory"),
        (["--limit", "5"], "--limit is for tasks; name them by --tasks"),
        (["--out", "."], "--out . is a directory; name a file"),
        (["--out", "nowhere/figures.json"], "--out nowhere/figures.json: its folder does not exist; create it first"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], words: str, trained: Path, tmp_path: Path):
    done = run("eval", "--checkpoint", str(trained), *arguments, cwd=tmp_path)
    assert done.returncode == 78
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_that_lm_eval_lacks_and_definitions_that_it_cannot_load(trained: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    definition(tmp_path / "definitions", "words", tmp_path / "no.jsonl")
    where = ("--task-path", str(tmp_path / "definitions"))
    done = run("eval", "--checkpoint", str(trained), "--tasks", "words", *where, HF_DATASETS_CACHE=str(tmp_path))
    assert done.returncode == 78
    assert "--tasks words cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unknown_name_gets_the_nearest(trained: Path):
    """Slow: the harness reads its thousands of definitions."""
    pytest.importorskip("lm_eval")
    done = run("eval", "--checkpoint", str(trained), "--tasks", "arc_eazy")
    assert done.returncode == 78
    assert "did you mean arc_easy?" in done.stderr


def test_without_lm_eval_the_extra_is_named(trained: Path, tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'lm_eval' else found(name, *more)\n"
    )
    path = f"{tmp_path}:{sys.path[0]}:{Path(__file__).resolve().parents[2]}"
    done = run("eval", "--checkpoint", str(trained), "--tasks", "piqa", launcher="python", PYTHONPATH=path)
    assert done.returncode == 78
    assert done.stderr.strip().endswith("pip install 'stablelm[eval]', or give a .jsonl file")
