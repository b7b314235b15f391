"""Toy checkpoints for the tests: known tensors, one line to save them, and ways to hurt them."""

import json
from pathlib import Path
from typing import Any

import torch

from stablelm.checkpoint import commit, manifest
from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.fence import Fence
from stablelm.checkpoint.manifest import record_of_file
from stablelm.checkpoint.remote_path import CheckpointPath
from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import apply_method

STATE = {"step": 0, "tokens": 12, "data": {"data_step": 3, "lanes": {"0": [0, 1, 2, 3, 4]}}, "identity": {}}
CONFIG = "run:\n  seed: 1\n"


def toy_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Several shapes and dtypes, a scalar and an empty one; a function of the seed only."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.embedding.weight": torch.randn(33, 16, generator=draw),
        "model.layers.0.bias": torch.randn(7, generator=draw).bfloat16(),
        "model.layers.0.gain": torch.randn(5, 3, generator=draw, dtype=torch.float64),
        "model.layers.0.none": torch.empty(0, 4),
        "optim.embedding.weight.exp_avg": torch.randn(33, 16, generator=draw),
        "optim.embedding.weight.step": torch.tensor(float(seed)),
        "optim.count": torch.tensor([seed, 2], dtype=torch.int64),
    }


def blanks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(tensor, -1) for name, tensor in tensors.items()}


def save_toy(root: CheckpointPath, step: int, *, group: Any = None, fence: Fence | None = None, **options: Any) -> Any:
    """The SaveResult of committing toy_tensors(step) as `step`, with token 1 where no fence is given."""
    fence = fence or Fence(root, 1, "a1")
    tensors = toy_tensors(step)
    return commit.save(
        fence, step, tensors, {**STATE, "step": step}, CONFIG, shapes=shapes_of(tensors), group=group, **options
    )  # fmt: skip


SIZES: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 16,
    "n_heads": 2,
    "kv_heads": 2,
    "d_ff": 32,
    "max_seq_len": 8,
    "vocab_size": 64,
}


def save_small(root: CheckpointPath, step: int, *, without: str = "") -> Any:
    """The SaveResult of committing a small model's every tensor, but for those whose names begin with `without`.

    Its save asks for what it is given, as saves did that could be incomplete.
    """
    model = apply_method(ModelConfig(**SIZES))
    shapes = {name: shape for name, shape in expected_shapes(model).items() if not name.startswith(without or "-")}
    tensors = {name: torch.full(shape, float(step)) for name, shape in shapes.items()}
    state = {"step": step, "tokens": 0, "data": {"data_step": step, "lanes": {}}, "identity": {}}
    return commit.save(
        Fence(root, 1, "a1"),
        step,
        tensors,
        state,
        json.dumps({"model": SIZES, "data": {"seq_len": SIZES["max_seq_len"]}}),
        shapes=shapes,
        group=None,
    )


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """What a save of whole tensors must hold."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name
        assert got[name].dtype == tensor.dtype, name


def flip_bit(path: Path, position: int) -> None:
    """Flips one bit of a file, counted from its first byte's lowest."""
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def left_over(root: Path) -> list[str]:
    """Names below the checkpoints directory that are neither committed steps nor fencing tokens."""
    return sorted(path.name for path in root.iterdir() if not path.name.startswith(("step-", "fence")))


def seal_anew(path: Path) -> None:
    """Makes manifest and COMMITTED fit whatever the files are now, as a forger would."""
    commit = manifest.read_commit(path)
    records = {
        name: record_of_file(path / name) for name in manifest.files_below(path) - {"manifest.json", "COMMITTED"}
    }
    (path / "manifest.json").write_bytes(manifest.manifest_content(records))
    fitting = record_of_file(path / "manifest.json").sha256
    forged = manifest.Commit(commit.step, commit.attempt, commit.token, commit.time, fitting)
    (path / "COMMITTED").write_bytes(manifest.commit_content(forged))
    assert manifest.verify(path) == []
