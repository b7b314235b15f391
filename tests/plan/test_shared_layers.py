"""The plan of a model whose layers run at several places: collectives as the engine makes them, memory near it."""

import pytest

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.methods.sizes import parameter_counts
from stablelm.plan.collectives import collectives
from stablelm.plan.simulate import simulate

SIZES = ("model.n_layers=6", "model.d_model=64", "model.n_heads=4", "data.seq_len=32", "train.steps=5")


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.stack=cycle", "engine.kind=fsdp2"),
        ("model.stack=sequence", "engine.kind=fsdp2", "model.shared.repeats=3", "engine.accumulate=sharded"),
        ("model.stack=cycle", "engine.kind=hsdp", "train.micro_batch_size=2", "engine.recompute=every:2"),
    ],
)
def test_collectives_and_peak_are_those_of_the_engine(overrides):
    given = (*SIZES, "train.global_batch_size=8", "train.micro_batch_size=1", *overrides)
    config = resolve(load([], list(given)).config, pieces=128, world_size=4, accelerate_precision=None)
    layout = rank_memory.make_layout(config, config.engine.kind, 4, 2)
    listed = rank_memory.parameters(config)
    assert sum(parameter.elements for parameter in listed) == parameter_counts(config.model)["total"]
    found, planned = simulate(config, listed, layout, nodes=2), collectives(config, listed, layout)
    assert found.exact
    assert found.collectives == planned.counts
    assert {kind: found.collective_bytes[kind] for kind in planned.bytes} == planned.bytes
    assert found.peak.total() == pytest.approx(estimate.peak(config, listed, layout).total(), rel=0.25)
