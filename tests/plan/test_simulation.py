"""The estimates against the simulation, and the simulation against torch's own counters and real engines."""

import warnings
from dataclasses import replace

import pytest
import torch
from planned import planned
from support.distributed import run_ranks
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.tensor.debug import CommDebugMode

from stablelm.config.schema import Config
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.model.memory.memory_tracker import MemoryTracker
from stablelm.plan import simulate
from stablelm.plan.collectives import collectives, ddp_buckets
from stablelm.plan.fake_engine import FakeEngine, fake_ranks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ODD = ("model.d_model=72", "model.n_heads=4", "data.seq_len=16")


def layout_of(config: Config, world_size: int) -> rank_memory.Layout:
    return rank_memory.make_layout(config, str(config.engine.kind), world_size, 1)


@pytest.mark.parametrize(
    ("kind", "world_size", "micro_batches", "overrides"),
    [
        ("single", 1, 3, ("train.precision=bf16",)),
        ("fsdp2", 2, 3, ("engine.unit_bytes=1", "train.precision=bf16")),
        ("fsdp2", 7, 1, ("engine.unit_bytes=1", "model.method=magneto_sigma")),
        ("fsdp2", 16, 1, ("engine.unit_bytes=200000", "engine.recompute=full", "train.precision=bf16")),
        ("hsdp", 10, 1, ("engine.unit_bytes=200000", "engine.replicas=2", "train.precision=bf16")),
        ("hsdp", 4, 3, ("engine.unit_bytes=1",)),
        ("fsdp2", 5, 1, ("model.method=catformer", "train.precision=bf16")),
        ("fsdp2", 3, 1, ("model.method=catformer_sigma", "model.n_layers=7")),
    ],
)
def test_resting_bytes_and_collectives(kind: str, world_size: int, micro_batches: int, overrides: tuple[str, ...]):
    """72 rows over 7, 10 or 16 ranks leave some with fewer, or none: the padding counts."""
    config = planned(*ODD, *overrides, world_size=world_size, micro_batches=micro_batches, kind=kind)
    listed, layout = rank_memory.parameters(config), layout_of(config, world_size)
    found = simulate.simulate(config, listed, layout, layers=config.model.n_layers)
    held = rank_memory.resting(config, listed, layout)
    assert found.exact
    assert found.resting["weights"] == held["weights"]
    assert found.resting["moments"] == held["moments"]
    assert found.gradients == held["gradients"]
    expected = collectives(found.simulated, listed, layout)
    assert found.collectives == +expected.counts
    assert found.collective_bytes == +expected.bytes


@pytest.mark.parametrize(
    ("kind", "world_size", "recompute", "micro_batches", "layers", "in_unit"),
    [
        ("fsdp2", 4, "none", 1, 8, 1),
        ("fsdp2", 4, "full", 1, 8, 1),
        pytest.param("hsdp", 8, "none", 2, 8, 1, marks=pytest.mark.slow),
        pytest.param("single", 1, "full", 2, 8, 1, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, "none", 2, 24, 3, marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, "full", 2, 23, 3, marks=pytest.mark.slow),
    ],
)
def test_few_layers_stand_for_many_exactly(
    kind: str, world_size: int, recompute: str, micro_batches: int, layers: int, in_unit: int
):
    config = planned(
        f"model.n_layers={layers}",
        f"engine.unit_bytes={in_unit * 2 * 12 * 64**2}",
        "train.precision=bf16",
        f"engine.recompute={recompute}",
        "data.seq_len=16",
        world_size=world_size,
        micro_batches=micro_batches,
        kind=kind,
    )
    listed, layout = rank_memory.parameters(config), layout_of(config, world_size)
    few = simulate.simulate(config, listed, layout)
    whole = simulate.simulate(config, listed, layout, layers=layers)
    assert few.simulated.model.n_layers < layers == whole.simulated.model.n_layers
    assert few.exact
    assert few.peak.total() == whole.peak.total()
    assert few.resting == whole.resting
    assert few.kept == whole.kept
    assert few.operations == pytest.approx(whole.operations, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["catformer", "denseformer"])
def test_few_different_layers_stand_for_many_nearly(method: str):
    sizes = (f"model.method={method}", "model.n_layers=40", "train.precision=bf16", "engine.unit_bytes=100000")
    config = planned(*sizes, world_size=4, kind="fsdp2")
    listed, layout = rank_memory.parameters(config), layout_of(config, 4)
    few = simulate.simulate(config, listed, layout)
    whole = simulate.simulate(config, listed, layout, layers=40)
    assert whole.exact and not few.exact
    assert few.kept == pytest.approx(whole.kept, rel=0.01)
    assert few.peak.total() == pytest.approx(whole.peak.total(), rel=0.07)


@pytest.mark.parametrize("kind", ["single", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_estimated_peak_is_near(kind: str, recompute: str):
    world_size = 1 if kind == "single" else 8
    config = planned(
        "model.n_layers=6", "model.d_model=256", "data.seq_len=256", "train.precision=bf16",
        f"engine.recompute={recompute}", "engine.unit_bytes=1", world_size=world_size, kind=kind,
    )  # fmt: skip
    listed, layout = rank_memory.parameters(config), layout_of(config, world_size)
    found = simulate.simulate(config, listed, layout, layers=6)
    assert estimate.peak(config, listed, layout).total() == pytest.approx(found.peak.total(), rel=0.05)


def test_the_tracker_counts_as_torchs_own():
    """FSDPMemTracker is right where a unit is one layer; CommDebugMode anywhere."""
    config = planned("engine.unit_bytes=1", "train.precision=bf16", "data.seq_len=16", world_size=4, kind="fsdp2")
    layout = layout_of(config, 4)
    with fake_ranks(layout, 1) as ranks, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = FakeEngine(config, "fsdp2", ranks)
        assert engine.optimizer is not None
        own = MemoryTracker()
        own.assign(engine.module.parameters(), "weights")
        own.assign((s[m] for s in engine.optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")), "moments")
        with engine.mode:
            tokens, targets = (torch.zeros(2, 16, dtype=torch.int64) for _ in range(2))
            own.assign((tokens, targets), "inputs")
            tracker, comms = FSDPMemTracker(engine.module), CommDebugMode()  # pyright: ignore[reportArgumentType]
            tracker.track_inputs((tokens, targets))
            with comms, tracker, own:
                TorchEngine.backward(engine, TorchEngine.loss(engine, tokens, targets).total, last=True)
                snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        assert own.peak.total() - own.peak["moments"] == snapshot["Total"]  # it does not count them
        assert own.collectives.total() == comms.get_total_counts()
        names = {
            "_allgather_base_": "all_gather",
            "_reduce_scatter_base_": "reduce_scatter",
            "allreduce_": "all_reduce",
        }
        counts = {str(op).split(".")[-1]: n for op, n in comms.get_comm_counts().items()}
        assert {names[op]: n for op, n in counts.items()} == own.collectives


def local_bytes(rank: int, world_size: int, config: Config) -> dict[str, int]:
    engine = TorchEngine(config, str(config.engine.kind), Ranks(rank, world_size, torch.device("cpu"), None, None))
    tokens = torch.randint(300, (2, config.data.seq_len))
    engine.backward(engine.loss(tokens, tokens).total, last=True)
    assert engine.optimizer is not None

    def size(tensors) -> int:
        return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)

    states = engine.optimizer.state.values()
    return {
        "weights": size(engine.module.parameters()),
        "gradients": size(p.grad for p in engine.module.parameters()),
        "moments": size(s[name] for s in states for name in ("exp_avg", "exp_avg_sq")),
    }


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_real_ranks_hold_what_is_planned(kind: str):
    config = planned("model.d_model=36", "model.n_heads=2", "model.d_ff=37", "data.seq_len=8", world_size=2, kind=kind)
    listed, layout = rank_memory.parameters(config), layout_of(config, 2)
    for rank, found in enumerate(run_ranks(local_bytes, 2, config)):
        assert found == dict(rank_memory.resting(config, listed, layout, rank))


def deepspeed_bytes(rank: int, world_size: int, config: Config) -> dict[str, int]:
    from stablelm.engine.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(config, str(config.engine.kind), Ranks(rank, world_size, torch.device("cpu"), None, None))
    assert engine.optimizer is not None
    tensors = engine.tensors()
    moments = (t for name, t in tensors.items() if name.endswith(("exp_avg", "exp_avg_sq")))
    return {
        "masters": sum(getattr(t, "local", t).nbytes for name, t in tensors.items() if name.startswith("model.")),
        "moments": sum(getattr(t, "local", t).nbytes for t in moments),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_real_zero_ranks_hold_what_is_planned(kind: str):
    pytest.importorskip("deepspeed")
    config = planned("model.d_model=36", "model.n_heads=2", "model.d_ff=37", "data.seq_len=8", world_size=2, kind=kind)
    held = rank_memory.resting(config, rank_memory.parameters(config), layout_of(config, 2))
    ranks = run_ranks(deepspeed_bytes, 2, config)
    for name in ("masters", "moments"):
        # Both ranks together hold all of it, shared out to within the padding.
        assert sum(found[name] for found in ranks) <= 2 * held[name]
        assert max(found[name] for found in ranks) == pytest.approx(held[name], rel=0.01)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_by_definition(stage: int):
    config = planned(world_size=4, kind=f"zero{stage}")
    listed = rank_memory.parameters(config)
    total = sum(parameter.elements for parameter in listed)
    held = rank_memory.resting(config, listed, layout_of(config, 4))
    padding = 4 * len(listed) * 4
    assert held["moments"] == pytest.approx(2 * total, abs=padding)  # 8 bytes an element over 4 ranks
    assert held["masters"] == pytest.approx(total, abs=padding)
    assert held["gradients"] == pytest.approx(4 * total if stage == 1 else total, abs=padding)
    if stage < 3:
        assert held["weights"] == 4 * total
    assert held["weights"] >= total


def test_buckets_of_ddp():
    assert ddp_buckets([4 * 2**20] * 8) == [4 * 2**20, 28 * 2**20]
    assert ddp_buckets([10, 20]) == [30]


def test_unreduced_gradients_are_planned():
    """FSDP2 reduces nothing before the last micro-batch: whole gradients wait on every rank."""
    one, two = (planned("train.precision=bf16", world_size=8, micro_batches=n, kind="fsdp2") for n in (1, 2))
    listed = rank_memory.parameters(one)
    assert rank_memory.accumulated(one, listed, layout_of(one, 8)) == 0
    assert rank_memory.accumulated(two, listed, layout_of(two, 8)) == 4 * sum(p.elements for p in listed)
    assert rank_memory.accumulated(replace(two), listed, rank_memory.make_layout(two, "zero2", 8, 1)) == 0
