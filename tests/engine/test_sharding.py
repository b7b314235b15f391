"""Units of FSDP2 and HSDP: how layers are grouped, what is gathered, and how often."""

import dataclasses
from collections import Counter

import pytest
import torch
from engine.test_engines import MODEL, TRAIN, ranks_here, text
from support.distributed import run_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from stablelm.config.schema import Config, EngineConfig
from stablelm.engine.ranks import Ranks
from stablelm.engine.sharding import default_replicas, units
from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods.catalogue import apply_method
from stablelm.model.decoder import Decoder

LAYER_BYTES = 2 * sum(p.numel() for p in nn.TransformerEncoderLayer(8, 1, 32).parameters() if p.ndim > 1)


def layers(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.TransformerEncoderLayer(8, 1, 32) for _ in range(count))


@pytest.mark.parametrize(
    ("count", "unit_bytes", "sizes"),
    [
        (6, 1, [1] * 6),
        (6, LAYER_BYTES, [1] * 6),
        (6, LAYER_BYTES + 1, [2, 2, 2]),
        (7, 3 * LAYER_BYTES, [3, 3, 1]),
        (3, 10**9, [3]),
    ],
)
def test_layers_are_grouped_by_bytes(count: int, unit_bytes: int, sizes: list[int]):
    found = units(layers(count), unit_bytes)
    assert [len(unit) for unit in found] == sizes


def test_one_copy_a_node():
    assert default_replicas(16, 4) == 4
    assert default_replicas(8, 1) == 2
    assert default_replicas(6, 4) == 2  # four copies of six ranks cannot be
    assert default_replicas(9, 2) == 3


def make(kind: str, ranks: Ranks, n_layers: int, unit_layers: int) -> TorchEngine:
    model = dataclasses.replace(apply_method(MODEL), n_layers=n_layers)
    with torch.device("meta"):
        one = Decoder(dataclasses.replace(model, n_layers=1), "fp32").layers[0]
    unit_bytes = unit_layers * 2 * sum(p.numel() for p in one.parameters() if p.ndim > 1)
    train = dataclasses.replace(TRAIN, precision="bf16")
    return TorchEngine(Config(model=model, train=train, engine=EngineConfig(unit_bytes=unit_bytes)), kind, ranks)


def count_collectives(rank: int, world_size: int, kind: str, n_layers: int, unit_layers: int, micro: int) -> dict:
    ranks = ranks_here(rank, world_size)
    engine = make(kind, ranks, n_layers, unit_layers)
    rows = text()[rank::world_size]
    seen: set[torch.dtype] = set()

    def look(module, inputs):
        seen.update(p.dtype for p in module.parameters() if p.ndim > 1)
        assert all(p.dtype == torch.float32 for p in module.parameters() if p.ndim < 2)

    if kind != "ddp":  # which gathers nothing
        engine.module.layers[0].register_forward_pre_hook(look)
    parts = list(zip(rows[:, :-1].split(micro), rows[:, 1:].split(micro), strict=True))
    counts: Counter[str] = Counter()
    for index, (tokens, targets) in enumerate(parts):
        last = index == len(parts) - 1
        with CommDebugMode() as counted:  # one for each: its hooks pile up over several forward passes
            engine.backward(engine.loss(tokens, targets, last=last).total, last=last)
        counts += Counter({str(op).rpartition(".")[2]: n for op, n in counted.get_comm_counts().items()})
    return {"counts": dict(counts), "dtypes": seen}


@pytest.mark.parametrize(("kind", "world_size"), [("fsdp2", 2), ("hsdp", 4)])
def test_collectives_of_a_step_follow_the_closed_form(kind: str, world_size: int):
    """Layers are gathered twice a micro-batch, the embedding once, the head once a step; each is reduced once."""
    n_layers, unit_layers, n_units, steps = 24, 8, 3, 3
    found = run_ranks(count_collectives, world_size, kind, n_layers, unit_layers, 12 // world_size // steps)[0]
    counts = found["counts"]
    assert found["dtypes"] == {torch.bfloat16}
    assert counts["_allgather_base_"] == steps * (2 * n_units + 1) + 1
    assert counts["_reduce_scatter_base_"] == n_units + 2


def test_ddp_reduces_once_a_step_however_many_micro_batches():
    one, four = (run_ranks(count_collectives, 2, "ddp", 4, 1, micro)[0]["counts"] for micro in (6, 2))
    assert set(one) == {"allreduce_"}  # one for each bucket of gradients
    assert four == one
