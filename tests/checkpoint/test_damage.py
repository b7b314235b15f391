"""Damaged and hostile checkpoints: never loaded, never executed."""

import contextlib
import io
import os
import pickle
import random
import shutil
from collections import Counter

import pytest
import torch
import yaml
from support.disks import watch
from support.distributed import run_ranks
from support.saved import blanks, flip_bit, save_toy, seal_anew, toy_tensors

from stablelm.checkpoint import manifest, saved_run, selection
from stablelm.checkpoint.format import load_tensors
from stablelm.engine.consensus import Consensus
from stablelm.errors import CheckpointError


@pytest.fixture
def path(tmp_path):
    return save_toy(tmp_path / "checkpoints", 7).path


def test_a_thousand_flipped_bits_are_all_refused(path):
    """Each bit of the checkpoint is as likely as any other, but every file gets at least fifty of them."""
    draw = random.Random(4)
    sizes = {name: 8 * (path / name).stat().st_size for name in sorted(manifest.files_below(path))}
    spread = [name for name in sizes for _ in range(50)]
    spread += draw.choices(list(sizes), weights=list(sizes.values()), k=1000 - len(spread))
    refused = Counter()
    for name in spread:
        whole = (path / name).read_bytes()
        flip_bit(path / name, draw.randrange(sizes[name]))
        with pytest.raises(CheckpointError, match=r"is damaged .*" + name.rsplit("/", 1)[-1]):
            selection.resolve_checkpoint(path)
        (path / name).write_bytes(whole)
        refused[name] += 1
    assert refused.total() == 1000
    assert min(refused.values()) >= 50
    assert selection.resolve_checkpoint(path) == path


class Malicious:
    """Unpickling it makes the folder that it names."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


TENSORS = ["tensors/index.json", "tensors/rank-00000-0.safetensors"]
NAMES = [*TENSORS, "state.json", "config.yaml", "manifest.json", "COMMITTED"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_malicious_pickle_in_any_place_is_never_executed(path, tmp_path, monkeypatch, name, form, sealed):
    """Sealed: whoever made it also wrote a manifest and COMMITTED that fit, so that hashes do not save us."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = tmp_path / "executed"
    if form == "pickle":
        (path / name).write_bytes(pickle.dumps(Malicious(target)))
    else:
        torch.save(Malicious(target), buffer := io.BytesIO())
        (path / name).write_bytes(buffer.getvalue())
    if sealed and name not in ("manifest.json", "COMMITTED"):
        seal_anew(path)

    def whole_way():
        found = selection.resolve_checkpoint(path)
        saved_run.read_state(found)
        load_tensors(found / "tensors", blanks(toy_tensors()), None)

    if sealed and name == "config.yaml":
        whole_way()  # resuming never reads it; evaluation does, as YAML without tags
    else:
        with pytest.raises(CheckpointError):
            whole_way()
    for read in (
        lambda: load_tensors(path / "tensors", blanks(toy_tensors()), None),
        lambda: saved_run.read_state(path),
        lambda: yaml.safe_load((path / "config.yaml").read_bytes()),
        lambda: manifest.read_manifest(path, manifest.read_commit(path)),
    ):
        with contextlib.suppress(CheckpointError, ValueError, yaml.YAMLError):
            read()
    assert not target.exists()


def ranks_verify(rank, world_size, root):
    """Each rank reads only its share, all find the same; then one that reads nothing dies while the others load."""
    import torch.distributed as dist

    consensus = Consensus(dist.group.WORLD, rank)
    read: list[str] = []
    record = manifest.record_of_file
    manifest.record_of_file = lambda path: (read.append(path.name), record(path))[1]
    reports: list = []
    found = selection.newest_valid(
        root, on_damaged=lambda path, why: reports.append((path.name, why)), consensus=consensus
    )
    words = ""
    try:
        selection.resolve_checkpoint(root / "step-00000002", consensus=consensus)
    except CheckpointError as error:
        words = str(error)
    return str(found), sorted(read), reports, words


@pytest.mark.slow
def test_ranks_share_the_reading_and_agree(tmp_path):
    for step in (1, 2):
        path = save_toy(tmp_path, step).path
    flip_bit(path / "state.json", 40)
    results = run_ranks(ranks_verify, 2, tmp_path)
    (first, read_0, reports_0, words_0), (second, read_1, reports_1, words_1) = results
    assert first == second == str(tmp_path / "step-00000001")
    assert words_0 == words_1
    assert "state.json was changed" in words_0
    assert reports_0 == [("step-00000002", "state.json was changed after it was written (its sha256 differs)")]
    assert reports_1 == []
    # Four files each in three looks: the damaged step, the older one, and the one that was named.
    assert len(read_0) == len(read_1) == 6
    assert set(read_0).isdisjoint(read_1)


def one_rank_dies_loading(rank, world_size, path):
    import torch.distributed as dist

    if rank == 1:
        watch(lambda event, name, mode: os._exit(9) if name.endswith(".safetensors") else None)
    load_tensors(path / "tensors", blanks(toy_tensors()), dist.group.WORLD)


@pytest.mark.slow
def test_a_rank_that_dies_during_load_ends_the_others(path):
    with pytest.raises(RuntimeError, match="rank 1: died with exit code 9") as caught:
        run_ranks(one_rank_dies_loading, 2, path, timeout=60)
    assert "rank 0: Traceback" in str(caught.value)
    assert selection.resolve_checkpoint(path) == path


def test_extra_tensor_files_are_refused(path):
    shutil.copy(path / "tensors/rank-00000-0.safetensors", path / "tensors/rank-00001-0.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00001-0\.safetensors is not in the manifest"):
        selection.resolve_checkpoint(path)
