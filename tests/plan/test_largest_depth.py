"""The largest depth fits and one more layer does not, by the same estimate."""

from dataclasses import replace

import pytest
from planned import SHAPE

from stablelm.config.load import load
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.methods.catalogue import METHODS
from stablelm.observe.accelerators import chosen
from stablelm.plan.largest_depth import MEMORY, MOST_LAYERS
from stablelm.plan.output.figures import Plan
from stablelm.plan.output.plan_text import text
from stablelm.plan.planner import make
from stablelm.plan.request import PlanRequest, prepare

SMALL = [*SHAPE, "model.vocab_size=320", "train.global_batch_size=64", "train.precision=bf16", "data.seq_len=256"]


def requested(memory_gb: float, *overrides: str, world_size: int = 8) -> PlanRequest:
    gpu = chosen(None, {"--peak-tflops": 100, "--memory-gb": memory_gb, "--bandwidth": 1000})
    return prepare(load([], [*SMALL, *overrides]), world_size, gpu, 8, simulated=False)


def estimated(made: Plan, n_layers: int) -> int:
    """Peak bytes by the estimate of the model of that depth, built in full."""
    config = made.request.at_depth(n_layers).config
    return estimate.peak(config, rank_memory.parameters(config), made.layout).total()


@pytest.mark.parametrize(
    ("kind", "overrides", "world_size"),
    [
        ("single", (), 1),
        ("ddp", (), 8),
        ("fsdp2", ("engine.recompute=full",), 8),
        ("fsdp2", ("engine.unit_bytes=1000000",), 16),
        ("hsdp", (), 16),
        ("zero1", ("engine.unit_bytes=1000000",), 8),
        ("zero3", ("engine.recompute=full", "engine.unit_bytes=1000000"), 16),
        pytest.param("fsdp2", ("model.method=catformer",), 8, marks=pytest.mark.slow),
        pytest.param("fsdp2", ("model.method=denseformer",), 8, marks=pytest.mark.slow),
    ],
)
def test_it_fits_and_one_more_layer_does_not(kind: str, overrides: tuple[str, ...], world_size: int):
    made = make(requested(5.1, "model.d_model=128", f"engine.kind={kind}", *overrides, world_size=world_size))
    found = made.depth
    assert found is not None and found.limit == MEMORY
    assert 4 < found.layers < MOST_LAYERS
    assert found.peak == estimated(made, found.layers) <= made.request.usable
    assert estimated(made, found.layers + 1) > made.request.usable


def test_planned_at_its_largest_depth_a_run_fits():
    request = requested(5.5, "engine.kind=fsdp2")
    found = make(request).depth
    assert found is not None
    again = make(request.at_depth(found.layers))
    assert again.fits and again.depth == found
    deeper = make(request.at_depth(found.layers + 1))
    assert not deeper.fits and deeper.depth == found


@pytest.mark.slow
# Widths of a concatenated stream follow depth, so each depth tried is solved anew: one such method stands for both.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "catformer_sigma"])
def test_every_method_has_a_largest_depth(method: str):
    request = requested(5.1, f"model.method={method}", "model.n_layers=12", "engine.kind=fsdp2")
    found = make(request).depth
    assert found is not None and found.layers > 0


def test_a_limit_that_is_not_memory_is_named():
    shown = text(made := make(requested(80, "engine.kind=fsdp2")))
    assert made.depth is not None and made.depth.layers == MOST_LAYERS
    assert "limit: the search, which ends at 4,096 layers" in " ".join(shown.split())
    nothing = make(requested(5.001, "engine.kind=fsdp2"))
    assert nothing.depth is not None and nothing.depth.layers == 0
    assert "not one layer fits" in text(nothing)


def test_a_dry_run_scales_the_estimate():
    """What the plan says of its own depth and what the search says agree."""
    request = replace(requested(5.05, "engine.kind=fsdp2"), simulated=True)
    made = make(request)
    assert made.depth is not None and made.simulation is not None
    assert made.fits == (made.depth.layers >= 4)
