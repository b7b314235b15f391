import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.saved import assert_equal, blanks, toy_tensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from stablelm.checkpoint.background import HostCopy
from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.checkpoint.tensor_index import DTYPE_NAMES, DTYPES, read_index
from stablelm.engine.tensor_parts import clean_name
from stablelm.errors import CheckpointError

FILE = "rank-00000-0.safetensors"


def toy_model():
    """Rows 10, 6 and 2: no world size from 2 to 4 divides them all, and 2 leaves ranks of 3 with nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 6), nn.Linear(6, 2))


def sharded_tensors(group):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = DeviceMesh.from_group(group, "cpu")
    model = toy_model()
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tensors = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    assert all(isinstance(tensor, DTensor) for tensor in tensors.values())
    return {**tensors, "optim.step": torch.tensor(3.0)}


def save_on_two_load_on_one_and_three(rank, world_size, directory):
    """Groups of 1, 2 and 3 of the three ranks stand for three launches; a barrier is the time between them."""
    import torch.distributed as dist

    groups: Any = {size: dist.new_group(list(range(size))) for size in (1, 2, 3)}
    records = save_tensors(directory, sharded_tensors(groups[2]), groups[2]) if rank < 2 else {}
    dist.barrier()
    loaded = []
    for size in (1, 3):
        if rank < size:
            tensors = sharded_tensors(groups[size])
            with torch.no_grad():
                for tensor in tensors.values():
                    tensor.fill_(-1)
            load_tensors(directory, tensors, groups[size])
            full = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
            loaded.append({name: tensor.detach().clone() for name, tensor in full.items()})
    refusal = ""
    try:  # rank 1 alone finds the checkpoint unreadable; every rank must learn of it
        wrong = directory / "elsewhere" if rank == 1 else directory
        load_tensors(wrong, {"optim.step": torch.zeros(())}, groups[3], partial=True)
    except CheckpointError as error:
        refusal = str(error)
    return sorted(records), loaded, refusal


@pytest.mark.slow
def test_shards_of_two_ranks_load_on_one_and_three(tmp_path):
    records, loaded, refusals = zip(*run_ranks(save_on_two_load_on_one_and_three, 3, tmp_path / "tensors"), strict=True)
    assert records == (["index.json", "rank-00000-0.safetensors"], ["rank-00001-0.safetensors"], [])
    wanted = {f"model.{name}": parameter.detach() for name, parameter in toy_model().named_parameters()}
    wanted["optim.step"] = torch.tensor(3.0)
    assert [len(of_rank) for of_rank in loaded] == [2, 1, 1]
    for tensors in (tensors for of_rank in loaded for tensors in of_rank):
        assert_equal(tensors, wanted)
    plain = blanks(wanted)
    load_tensors(tmp_path / "tensors", plain, None)
    assert_equal(plain, wanted)
    assert len(set(refusals)) == 1
    assert "elsewhere" in refusals[0]


MESHES = {
    "replicas": [Replicate(), Shard(0)],
    "replicas within": [Shard(0), Replicate()],
    "shards of shards": [Shard(0), Shard(0)],
    "copies": [Replicate(), Replicate()],
}


def save_on_a_mesh(rank, world_size, directory):
    """Seven rows on 2 x 2 ranks, saved and loaded back on them; some ranks of three rows hold none."""
    mesh = init_device_mesh("cpu", (2, 2))
    tensors = {
        f"model.{name}.{rows}": distribute_tensor(values(rows), mesh, placements, src_data_rank=None)
        for name, placements in MESHES.items()
        for rows in (7, 3, 0)
    }
    tensors |= {f"model.plain.{index}": values(7) for index in range(12)}
    records = save_tensors(directory, tensors, torch.distributed.group.WORLD)
    held = HostCopy().copy(tensors)
    again = save_tensors(directory.with_name("copied"), held, torch.distributed.group.WORLD)
    loaded = {name: tensor.clone().fill_(-1) for name, tensor in tensors.items()}
    load_tensors(directory, loaded, torch.distributed.group.WORLD)
    same = all(torch.equal(getattr(t, "full_tensor", lambda t=t: t)(), values(t.shape[0])) for t in loaded.values())
    return {name: record.size for name, record in records.items()}, again == records, same


def values(rows):
    return torch.arange(5.0 * rows).reshape(rows, 5)


@pytest.mark.slow
def test_what_ranks_hold_alike_is_written_once_and_by_all_of_them(tmp_path):
    results = run_ranks(save_on_a_mesh, 4, tmp_path / "tensors")
    assert [(copied, same) for _, copied, same in results] == [(True, True)] * 4
    plain = {name: values(entry.shape[0]) for name, entry in read_index(tmp_path / "tensors").tensors.items()}
    assert len(plain) == 24
    loaded = blanks(plain)
    load_tensors(tmp_path / "tensors", loaded, None)
    assert_equal(loaded, plain)
    tensors = {path.name: load_file(path) for path in (tmp_path / "tensors").glob("*.safetensors")}
    assert len(tensors) == 4
    written = [sum(tensor.nbytes for tensor in held.values()) for held in tensors.values()]
    assert sum(written) == sum(tensor.nbytes for tensor in plain.values())
    assert max(written) < 2 * min(written)


@pytest.fixture
def saved(tmp_path):
    save_tensors(tmp_path / "tensors", toy_tensors(), None)
    return tmp_path / "tensors"


def test_records_are_those_of_the_files(saved, tmp_path):
    from stablelm.checkpoint.manifest import record_of_file

    records = save_tensors(tmp_path / "again", toy_tensors(), None)
    assert records == {path.name: record_of_file(path) for path in (tmp_path / "again").iterdir()}


def test_parameters_are_filled_in_place(saved):
    parameter = nn.Parameter(torch.zeros(33, 16))
    view = torch.zeros(16, 33).t()  # not contiguous
    wanted = toy_tensors()
    targets = {"model.embedding.weight": parameter, "optim.embedding.weight.exp_avg": view}
    load_tensors(saved, targets, None, partial=True)
    assert torch.equal(parameter, wanted["model.embedding.weight"])
    assert torch.equal(view, wanted["optim.embedding.weight.exp_avg"])
    assert parameter.requires_grad


def test_model_tensors_load_alone_only_if_partial(saved):
    wanted = {name: tensor for name, tensor in toy_tensors().items() if name.startswith("model.")}
    loaded = blanks(wanted)
    with pytest.raises(CheckpointError, match=r"unexpected: optim\.count, optim\..*exp_avg, optim\..*step"):
        load_tensors(saved, loaded, None)
    assert_equal(loaded, blanks(wanted))
    load_tensors(saved, loaded, None, partial=True)
    assert_equal(loaded, wanted)


def test_every_difference_is_named_before_anything_is_loaded(saved):
    wanted = {
        **blanks(toy_tensors()),
        **{f"model.new.{i}": torch.zeros(1) for i in range(5)},
        "model.layers.0.gain": torch.zeros(3, 5, dtype=torch.float64),
        "optim.count": torch.zeros(2),
    }
    with pytest.raises(CheckpointError) as caught:
        load_tensors(saved, wanted, None, partial=True)
    assert "missing: model.new.0, model.new.1, model.new.2 and 2 more" in str(caught.value)
    assert "model.layers.0.gain (5x3 float64 in the checkpoint, 3x5 float64 here)" in str(caught.value)
    assert "optim.count (2 int64 in the checkpoint, 2 float32 here)" in str(caught.value)
    assert torch.all(wanted["model.embedding.weight"] == -1)


def test_only_clean_tensors_are_saved(tmp_path):
    with pytest.raises(AssertionError, match="not a tensor"):
        save_tensors(tmp_path / "a", {"step": 3}, None)  # type: ignore[dict-item]
    with pytest.raises(AssertionError, match="prefix"):
        save_tensors(tmp_path / "a", {"model._orig_mod.w": torch.ones(1)}, None)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.layers.0._checkpoint_wrapped_module.w", "layers.0.w"),
        ("module.layers.1._orig_mod.w", "layers.1.w"),
        ("model.submodule.w", "model.submodule.w"),
        ("module.module.w", "w"),
    ],
)
def test_wrapper_prefixes_go(name, clean):
    assert clean_name(name) == clean


def test_stock_tools_read_it(saved):
    whole = toy_tensors()
    del whole["model.layers.0.none"]  # empty: the index alone tells of it
    assert_equal(load_file(saved / FILE), whole)


def test_data_is_aligned(tmp_path):
    save_tensors(tmp_path / "tensors", {f"model.{kind}": torch.ones(3, dtype=kind) for kind in DTYPE_NAMES}, None)
    content = (tmp_path / "tensors" / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    del header["__metadata__"]
    assert len(header) == len(DTYPE_NAMES)
    for entry in header.values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


def test_order_and_threads_change_no_byte(tmp_path):
    tensors = {f"model.{index}": torch.full((1 << 20,), float(index)) for index in range(20)}
    for name, order in (("a", 1), ("b", -1)):
        save_tensors(tmp_path / name, dict(list(tensors.items())[::order]), None)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["index.json", FILE, "rank-00000-1.safetensors"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
