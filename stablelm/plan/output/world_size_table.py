"""A comparison of numbers of ranks as a table of 80 columns, with a note for each that cannot be."""

from collections.abc import Iterable

from stablelm.methods.sizes import parameter_counts
from stablelm.plan.output.figures import Comparison, Plan
from stablelm.plan.output.units import folded, money, number, seconds, size

COLUMNS = (("GPUs", 6), ("memory", 10), ("step", 9), ("tokens/s", 11), ("MFU", 7), ("hours", 9), ("GPU-hours", 10))
COST = ("cost", 12)
FITS = "  fits"


def table(found: Comparison) -> str:
    """The comparison as text; memory is the peak per GPU."""
    plans = [found.plans[ranks] for ranks in found.world_sizes if ranks in found.plans]
    priced = plans[0].request.price is not None
    heads = [*COLUMNS, COST] if priced else [*COLUMNS]
    lines = [*_head(plans[0]), "", "".join(f"{name:>{width}}" for name, width in heads) + FITS]
    for ranks in found.world_sizes:
        if ranks in found.plans:
            cells = _cells(found.plans[ranks])
            row = "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, heads, strict=False))
            lines.append(f"{row}  {'yes' if found.plans[ranks].fits else 'no'}")
        else:
            lines.append(f"{ranks:>{COLUMNS[0][1]},}   not possible, see below")
    return "\n".join([*lines, *_notes(found)]) + "\n"


def _head(plan: Plan) -> Iterable[str]:
    request, config = plan.request, plan.request.config
    model, accelerator, cost = config.model, request.accelerator, plan.cost
    price = f", {money(request.price)} per GPU-hour" if request.price is not None else ""
    return [
        *folded(
            f"{model.method}, {model.n_layers} layers x {model.d_model}, "
            f"{parameter_counts(model)['total']:,} parameters, {config.train.precision}",
            0,
        ),
        *folded(
            f"{accelerator.name}, {size(accelerator.memory)} each{price}; engine {config.engine.kind}, "
            f"recompute {config.engine.recompute}, offload {config.engine.offload}",
            0,
        ),
        *folded(
            f"{cost.tokens:,} tokens in {cost.steps:,} steps of {request.batch} of {config.data.seq_len:,} tokens",
            0,
        ),
    ]


def _cells(plan: Plan) -> list[str]:
    time, cost = plan.time, plan.cost
    return [
        f"{plan.request.world_size:,}",
        size(plan.peak.total()),
        seconds(time.total),
        f"{time.tokens_per_second:,.0f}",
        f"{time.mfu:.1%}",
        number(cost.hours),
        number(cost.gpu_hours),
        "" if cost.dollars is None else f"${number(cost.dollars)}",
    ]


def _notes(found: Comparison) -> list[str]:
    notes = ["", "memory: peak per GPU; step, tokens/s, MFU and what follows: estimates"]
    for ranks, problem in found.problems.items():
        for line in problem.splitlines():
            notes += folded(f"  {ranks:,}: {line}", 4)
    return notes
