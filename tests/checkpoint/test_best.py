"""The best checkpoint by a metric: kept, listed, named by RUN_DIR/best, and known after any loss of files."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from support.saved import flip_bit, shapes_of, toy_tensors

from stablelm.checkpoint import best, commit, retention, selection
from stablelm.checkpoint.fence import Fence
from stablelm.errors import CheckpointError

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "checkpoints.py"
LOSS, ACCURACY = "val_loss/default", "task/words/acc"


def save(root: Path, step: int, metric: str | None, evaluations: dict[int, dict[str, float]]) -> None:
    """A toy checkpoint whose state knows these evaluations, as a run of this `evaluate.best` would have it."""
    tensors = toy_tensors(step)
    state = {
        "step": step,
        "tokens": 0,
        "data": {"data_step": step, "lanes": {}},
        "identity": {},
        "evaluations": best.to_state(evaluations, step, metric),
    }
    text = json.dumps({"evaluate": {"best": metric, "tasks": {"words": "words.jsonl"}}})
    commit.save(Fence(root, 1, "a1"), step, tensors, state, text, shapes=shapes_of(tensors), group=None)


def names(paths: list) -> list[str]:
    return [path.name for path in paths]


def run_of(root: Path, metric: str | None, losses: dict[int, float], *, keep: int = 1) -> list[str]:
    """Saves each step as a run does, with retention after each; the names that are left, newest first."""
    known: dict[int, dict[str, float]] = {}
    for step, loss in losses.items():
        earlier = best.best_step(known, metric)
        known = ({} if earlier is None else {earlier: known[earlier]}) | {step: {LOSS: loss, ACCURACY: 1 - loss / 10}}
        save(root, step, metric, known)
        retention.retain(root, keep, None, best=metric)
    return names(selection.step_directories(root))


@pytest.mark.parametrize("metric", [LOSS, ACCURACY])
def test_the_best_is_kept_besides_the_newest(metric: str, tmp_path: Path):
    left = run_of(tmp_path, metric, {1: 5.0, 2: 3.0, 3: 3.0, 4: 4.0, 5: 3.5})
    assert left == ["step-00000005", "step-00000002"]
    assert selection.resolve_checkpoint(tmp_path / "best").name == "step-00000002"
    assert selection.resolve_checkpoint(tmp_path).name == "step-00000005"


def test_without_a_metric_nothing_more_is_kept(tmp_path: Path):
    assert run_of(tmp_path, None, {1: 1.0, 2: 2.0, 3: 3.0}) == ["step-00000003"]
    with pytest.raises(CheckpointError, match=r"has no evaluate\.best"):
        selection.resolve_checkpoint(tmp_path / "best")


def test_a_step_without_evaluation_knows_the_best_before_it(tmp_path: Path):
    known = {2: {LOSS: 1.0}}
    for step in (2, 3, 4):
        save(tmp_path, step, LOSS, known)
    assert names(retention.superseded(tmp_path, 1, None, best=LOSS)) == ["step-00000003"]
    assert best.evaluations_of([tmp_path / "step-00000004"]) == known


def test_an_evaluation_made_after_its_step_was_saved_counts(tmp_path: Path):
    """A stop cut it short, the next attempt made it, and only a later state knows."""
    save(tmp_path, 2, LOSS, {})
    save(tmp_path, 3, LOSS, {2: {LOSS: 1.0}, 3: {LOSS: 2.0}})
    save(tmp_path, 4, LOSS, {2: {LOSS: 1.0}, 4: {LOSS: 3.0}})
    assert names(retention.superseded(tmp_path, 1, None, best=LOSS)) == ["step-00000003"]


def test_permanent_ones_may_be_the_best(tmp_path: Path):
    for step, loss in {2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0}.items():
        save(tmp_path, step, LOSS, {2: {LOSS: 1.0}, step: {LOSS: loss}})
    assert names(retention.superseded(tmp_path, 1, 2, best=LOSS)) == ["step-00000003"]


def test_a_damaged_best_gives_way_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert run_of(tmp_path, LOSS, {1: 2.0, 2: 1.0, 3: 3.0}, keep=3) == [f"step-0000000{step}" for step in (3, 2, 1)]
    flip_bit(tmp_path / "step-00000002" / "tensors" / "rank-00000-0.safetensors", 40)
    with caplog.at_level(logging.WARNING):
        assert selection.resolve_checkpoint(str(tmp_path / "best")).name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text


def test_a_folder_named_best_is_a_folder(tmp_path: Path):
    run_of(tmp_path / "best" / "checkpoints", LOSS, {1: 1.0, 2: 2.0}, keep=2)
    assert selection.resolve_checkpoint(tmp_path / "best").name == "step-00000002"
    with pytest.raises(CheckpointError, match="is not a directory"):
        selection.resolve_checkpoint(tmp_path / "nowhere" / "best")


def call(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def test_the_command_shows_and_keeps_it(tmp_path: Path):
    run_of(tmp_path / "checkpoints", LOSS, {1: 2.0, 2: 1.5, 3: 3.0, 4: 4.0}, keep=4)
    shown = call("list", tmp_path).stdout.splitlines()
    assert [line.endswith("best val_loss/default=1.5") for line in shown] == [False, False, False, True, False]
    (tmp_path / "config.yaml").write_text(
        f"checkpoint:\n  keep: 1\nevaluate:\n  best: {LOSS}\n  tasks: {{words: words.jsonl}}\n"
    )
    deleted = call("prune", tmp_path, "--dry-run").stdout
    assert [word in deleted for word in ("step-00000001", "step-00000002", "step-00000003")] == [True, False, True]
    wrong = call("prune", tmp_path, "--keep-best", "val_los/default")
    assert wrong.returncode == 78
    assert wrong.stderr.strip().endswith("they have task/words/acc, val_loss/default")
    call("prune", tmp_path, "--keep-best", ACCURACY)
    assert names(selection.step_directories(tmp_path / "checkpoints")) == ["step-00000004", "step-00000002"]
