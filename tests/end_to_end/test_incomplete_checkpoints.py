"""A checkpoint that was written without some optimizer state: found, said, skipped, and its weights can be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.programs import TINY, run, summary
from support.saved import seal_anew
from support.tiny import TinyCorpus

from stablelm.checkpoint import commit, selection
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.format import load_tensors
from stablelm.checkpoint.tensor_index import read_index


def strip(step: Path, left_out: str) -> None:
    """Saves a committed step anew, without the tensors whose names begin with `left_out`."""
    described = read_index(step / "tensors").tensors
    tensors = {
        name: torch.empty(entry.shape, dtype=entry.torch_dtype)
        for name, entry in described.items()
        if not name.startswith(left_out)
    }
    load_tensors(step / "tensors", tensors, None, partial=True)
    state, config = json.loads((step / "state.json").read_text()), (step / "config.yaml").read_text()
    number = state["step"]
    shutil.rmtree(step)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    commit.save(Fence(step.parent, 1, "1"), number, tensors, state, config, shapes=shapes, group=None)


@pytest.fixture
def trained(tiny_corpus: TinyCorpus, tmp_path: Path) -> list[str]:
    """The command line of a run that stands at step 4, with checkpoints of steps 2 and 4."""
    line = [*TINY, *tiny_corpus.overrides(), "train.steps=6", "checkpoint.every=2", f"run.dir={tmp_path / 'run'}"]
    assert run("pretrain", *line, "run.stop_after=4").returncode == 75
    return line


def test_the_one_before_is_resumed(trained: list[str], tmp_path: Path):
    newest, older = selection.step_directories(tmp_path / "run" / "checkpoints")
    strip(Path(str(newest)), "optim.layers.1")
    done = run("pretrain", *trained)
    assert done.returncode == 0, done.stderr
    assert f"warning: {newest} is damaged (it was saved incomplete: optim.layers.1." in " ".join(done.stdout.split())
    assert f"resumed from {older}" in " ".join(done.stdout.split())


def test_where_all_are_incomplete_their_weights_are_offered(trained: list[str], tmp_path: Path):
    newest, older = (Path(str(path)) for path in selection.step_directories(tmp_path / "run" / "checkpoints"))
    strip(newest, "optim.embedding")
    strip(older, "optim.embedding")
    refused = run("pretrain", *trained)
    assert refused.returncode == 78
    offer = f"run.init_from={newest}"
    assert f"{offer} starts a new run from them" in refused.stderr
    assert refused.stderr.count("\n") == 1
    told = run("eval", "--checkpoint", str(newest))
    assert told.returncode == 0, told.stderr
    fresh = run("pretrain", *trained, offer, f"run.dir={tmp_path / 'fresh'}")
    assert fresh.returncode == 0, fresh.stderr
    assert summary(tmp_path / "fresh")["step"] == 6


def test_checkpoints_of_the_earlier_format_are_one_sentence(trained: list[str], tmp_path: Path):
    for step in selection.step_directories(tmp_path / "run" / "checkpoints"):
        path = Path(str(step))
        (path / "tensors" / "index.json").rename(path / "tensors" / ".metadata")
        seal_anew(path)
    newest, _ = selection.step_directories(tmp_path / "run" / "checkpoints")
    for done in (run("pretrain", *trained), run("eval", "--checkpoint", str(newest))):
        assert done.returncode == 78
        assert f"{newest} was saved by stablelm 0.1" in done.stderr
        assert "stablelm 0.1.0, the last version" in done.stderr
        assert done.stderr.count("\n") == 1
    verified = run("checkpoints", "verify", str(tmp_path / "run"))
    assert verified.returncode == 78
    assert verified.stdout.count("was saved by stablelm 0.1") == 2
