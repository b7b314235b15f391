"""A checkpoint holds every parameter, buffer and moment whole, or it is none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from support.saved import left_over, save_small, shapes_of, toy_tensors
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from stablelm.checkpoint import commit, contents, selection
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.tensor_index import Piece, TensorEntry
from stablelm.config.schema import ModelConfig
from stablelm.engine.tensor_parts import FlatShard
from stablelm.methods.catalogue import apply_method
from stablelm.methods.sigma_reparam import SigmaOptions

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "checkpoints.py"


@pytest.mark.parametrize(
    ("shape", "pieces", "covers"),
    [
        ((4, 3), [((0, 0), (4, 3))], True),
        ((4, 3), [((2, 0), (2, 3)), ((0, 0), (2, 3))], True),
        ((4, 3), [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (3, 3))], True),
        ((4, 3), [((0, 0), (3, 3))], False),
        ((4, 3), [((0, 0), (2, 3)), ((0, 0), (2, 3))], False),  # as many elements, half of them twice
        ((4, 3), [((0, 0), (3, 3)), ((2, 0), (2, 3))], False),
        ((4, 3), [], False),
        ((), [((), ())], True),
        ((), [], False),
        ((0, 4), [], True),
        ((0, 4), [((0, 0), (0, 4))], True),
    ],
)
def test_pieces_cover_a_tensor_once(shape: tuple[int, ...], pieces: list, covers: bool):
    file = "rank-00000-0.safetensors"
    made = tuple(Piece(file=file, offsets=offsets, sizes=sizes) for offsets, sizes in pieces)
    entry = TensorEntry(dtype="F32", shape=shape, pieces=made)
    assert entry.complete == covers


def test_every_tensor_of_the_model_is_expected():
    model = ModelConfig(
        method="sigma_reparam", n_layers=2, d_model=16, n_heads=2, kv_heads=1, d_ff=32, max_seq_len=8, vocab_size=64,
        tie_embeddings=True, options=(SigmaOptions(targets="all"),),
    )  # fmt: skip
    shapes = contents.expected_shapes(apply_method(model))
    assert "model.head.weight" not in shapes  # the embedding itself
    buffers = [name for name in shapes if name.endswith((".u", ".v"))]
    assert len(buffers) == 2 * 2 * 6  # two vectors for each matrix of a layer
    parameters = [name for name in shapes if name.startswith("model.") and name not in buffers]
    for name in parameters:
        stem = name.removeprefix("model.")
        assert shapes[f"optim.{stem}.exp_avg"] == shapes[f"optim.{stem}.exp_avg_sq"] == shapes[name]
        assert shapes[f"optim.{stem}.step"] == ()
    assert len(shapes) == 4 * len(parameters) + len(buffers)


def save(root: Path, tensors: dict[str, Any], shapes: dict[str, torch.Size], group: Any = None) -> str:
    """What the save says when it fails; '' if it is committed."""
    try:
        commit.save(Fence(root, 1, "a"), 1, tensors, {}, "", shapes=shapes, group=group)
    except Exception as error:
        return repr(error)
    return ""


def test_a_save_that_lacks_a_tensor_is_not_committed(tmp_path: Path):
    tensors = toy_tensors()
    shapes = shapes_of(tensors)
    for name in tensors:
        partial = {each: tensor for each, tensor in tensors.items() if each != name}
        assert f"its save is incomplete: {name} missing or incomplete" in save(tmp_path, partial, shapes)
    wrong = tensors | {"model.layers.0.bias": torch.zeros(8, dtype=torch.bfloat16)}
    assert "model.layers.0.bias missing or incomplete" in save(tmp_path, wrong, shapes)
    assert left_over(tmp_path) == []
    assert selection.step_directories(tmp_path) == []
    assert save(tmp_path, tensors, shapes) == ""


def half_of_it(rank: int, world_size: int, root: Path) -> list[str]:
    group, mesh = torch.distributed.group.WORLD, init_device_mesh("cpu", (world_size,))
    whole = torch.arange(12.0).reshape(4, 3)
    split = distribute_tensor(whole, mesh, [Shard(0)])
    said = []
    for name, held in {
        "on one rank": {"w": split} if rank == 0 else {},
        "short": {"w": FlatShard(torch.ones(5), whole.shape, 6 * rank)},
        "whole": {"w": FlatShard(torch.ones(6), whole.shape, 6 * rank)},
        "rows": {"w": split},
    }.items():
        said.append(save(root / name, held, {"w": whole.shape}, group))
    return said


def test_a_part_that_a_rank_does_not_bring_is_missed_on_all_ranks(tmp_path: Path):
    for on_one, short, whole, rows in run_ranks(half_of_it, 2, tmp_path):
        assert on_one
        assert short
        assert (whole, rows) == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir() if selection.step_directories(path)) == ["rows", "whole"]


def test_verify_tells_what_is_incomplete_and_what_can_be_done(tmp_path: Path):
    save_small(tmp_path / "checkpoints", 1)
    assert contents.problems(tmp_path / "checkpoints" / "step-00000001") == []
    save_small(tmp_path / "checkpoints", 2, without="optim.embedding")
    save_small(tmp_path / "checkpoints", 3, without="model.layers.0")
    checked = subprocess.run(
        [sys.executable, str(COMMAND), "verify", str(tmp_path)], capture_output=True, text=True, check=False
    )
    weights, moments, complete = checked.stdout.splitlines()
    assert checked.returncode == 78
    assert "saved incomplete: model.layers.0" in weights
    assert "run.init_from" not in weights
    path = tmp_path / "checkpoints" / "step-00000002"
    assert "optim.embedding.weight.exp_avg, optim.embedding.weight.exp_avg_sq, optim.embedding.weight.step" in moments
    assert f"its weights are complete: run.init_from={path} starts a new run from them" in moments
    assert "incomplete" not in complete


def test_a_step_that_was_saved_incomplete_is_saved_anew(tmp_path: Path):
    tensors = toy_tensors()
    assert save(tmp_path, {"model.embedding.weight": tensors["model.embedding.weight"]}, {}) == ""
    assert save(tmp_path, tensors, shapes_of(tensors)) == ""
    assert len(list(tmp_path.glob("damaged-step-00000001-*"))) == 1
