"""From a configuration to plans of its run on any number of accelerators, in one CPU process and without data."""

import json
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stablelm.config.engine_rules import SHARDED
from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.observe.accelerators import chosen
from stablelm.optimizers.catalogue import extra_passes
from stablelm.out_file import check_out, write_out
from stablelm.plan.request import PlanRequest, prepare_each
from stablelm.process_exit import exit_code_of

if TYPE_CHECKING:
    from stablelm.engine.peak_memory.choice import Choice
    from stablelm.engine.peak_memory.rank_memory import Layout, Parameter
    from stablelm.plan.output.figures import Comparison, Plan
    from stablelm.plan.remedies import Remedy
    from stablelm.plan.simulate import Simulation


def plan(
    files: list[str],
    overrides: list[str],
    *,
    world_sizes: tuple[int, ...],
    gpu: str | None = None,
    figures: dict[str, float | None] | None = None,
    gpus_per_node: int = 8,
    price: float | None = None,
    out: str | None = None,
    simulated: bool = True,
) -> int:
    """Prints the plan, of several numbers of ranks a table, and writes it as JSON to `out`; returns the exit code.

    `gpu` and `figures`: as `observe.accelerators.chosen` takes them. Without `simulated` there is no dry run of the
    engine: quicker, less exact.
    """

    def check() -> tuple[dict[int, PlanRequest], dict[int, str]]:
        accelerator = chosen(gpu, figures or {})
        first, *others = world_sizes
        loaded = load(files, overrides, world_size=None if others else max(1, first))
        found = prepare_each(loaded, world_sizes, accelerator, gpus_per_node, simulated=simulated, price=price)
        check_out(out)
        return found

    return exit_code_of(check, lambda found: _run(world_sizes, *found, out))


def _run(
    world_sizes: tuple[int, ...], requests: dict[int, PlanRequest], problems: dict[int, str], out: str | None
) -> None:
    from stablelm.plan.output import figures, plan_text, world_size_table

    if len(world_sizes) > 1:
        compared = compare(world_sizes, requests, problems)
        shown, found = world_size_table.table(compared), figures.comparison_json(compared)
    else:
        (request,) = requests.values()
        made = make(request)
        shown, found = plan_text.text(made), figures.as_json(made)
    print(shown, end="", flush=True)
    if out is not None:
        write_out(out, json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"written: {out}", file=sys.stderr)


def compare(
    world_sizes: tuple[int, ...], requests: Mapping[int, PlanRequest], problems: Mapping[int, str]
) -> "Comparison":
    """The plans of the requests, as `request.prepare_each` gives them, without a search of the largest depth.

    One dry run serves all numbers of ranks whose steps do the same.
    """
    from stablelm.plan.output.figures import Comparison

    started, plans = time.perf_counter(), {}
    for ranks, request in requests.items():
        plans[ranks] = make(request, depth=False, near=tuple(plans.values()))
    return Comparison(world_sizes, plans, dict(problems), time.perf_counter() - started)


def make(request: PlanRequest, *, depth: bool = True, near: tuple["Plan", ...] = ()) -> "Plan":
    """The plan of a checked request, without `depth` not the largest depth that fits.

    `near`: plans of the same run on other numbers of ranks, whose dry runs may serve.
    """
    from stablelm.engine.peak_memory import estimate, rank_memory
    from stablelm.engine.peak_memory.choice import with_mode
    from stablelm.plan.collectives import collectives
    from stablelm.plan.largest_depth import largest_depth
    from stablelm.plan.output.figures import Plan
    from stablelm.plan.step_time import step_time

    started, layout = time.perf_counter(), _layout(request, request.config, request.world_size)
    request, choice = _with_concrete_recompute(request, layout)
    listed = rank_memory.parameters(request.config)
    request = _with_concrete_accumulation(request, listed)
    config = request.config
    with warnings.catch_warnings():
        # FSDP and the hooks of a dry run warn about what the real engine does on purpose.
        warnings.simplefilter("ignore")
        simulation, moved = _dry_run(request, listed, layout, near), collectives(config, listed, layout)
    held = rank_memory.resting(config, listed, layout)
    host = rank_memory.on_host(config, listed, layout, held)
    estimated = estimate.peak(config, listed, layout)
    # The dry run offloads nothing, its only device being the CPU.
    peak = estimated if simulation is None else simulation.peak - host
    time_of_step = step_time(
        config, listed, layout, moved, request.accelerator, gpus_per_node=request.gpus_per_node,
        operations=None if simulation is None else simulation.operations,
    )  # fmt: skip
    scale = peak.total() / estimated.total()
    remedy = _remedy(request, listed, scale) if peak.total() > request.usable else None
    deepest = None
    if depth:
        lean, needed = request, float(peak.total())
        if choice is not None:
            lean, needed = (
                replace(request, config=with_mode(config, choice.leanest)),
                scale * min(choice.peaks.values()),
            )
        deepest = largest_depth(lean, layout, needed, scale)
    return Plan(
        request, layout, listed, held, host, peak, simulation, moved, time_of_step, remedy, choice, deepest,
        time.perf_counter() - started,
    )  # fmt: skip


def _with_concrete_recompute(request: PlanRequest, layout: "Layout") -> tuple[PlanRequest, "Choice | None"]:
    """The request with the mode that `engine.recompute: auto` chooses, and what it chooses from."""
    from stablelm.engine.peak_memory.choice import choose, with_mode

    config = request.config
    if config.engine.recompute != "auto":
        return request, None
    choice = choose(config, layout, config.engine.memory_limit or request.usable, all_modes=True)
    return replace(request, config=with_mode(config, choice.mode)), choice


def _with_concrete_accumulation(request: PlanRequest, listed: "list[Parameter]") -> PlanRequest:
    """The request with what `engine.accumulate: auto` comes to on its accelerator."""
    from stablelm.engine.peak_memory.rank_memory import width
    from stablelm.engine.sharding import in_shards

    config = request.config
    if config.engine.kind not in SHARDED:
        return request
    size = sum(parameter.elements for parameter in listed) * width(config)
    where = "sharded" if in_shards(config, size, request.accelerator.memory) else "local"
    return replace(request, config=replace(config, engine=replace(config.engine, accumulate=where)))


def _layout(request: PlanRequest, config: Config, ranks: int) -> "Layout":
    from stablelm.engine.peak_memory.rank_memory import make_layout

    return make_layout(config, config.engine.kind, ranks, max(1, ranks // request.gpus_per_node), "cuda")


def _remedy(request: PlanRequest, listed: "list[Parameter]", scale: float) -> "Remedy | None":
    from stablelm.plan.remedies import first_that_fits

    layout_of = partial(_layout, request)
    return first_that_fits(request.config, listed, request.world_size, request.usable, scale, layout_of)


def _dry_run(
    request: PlanRequest, listed: "list[Parameter]", layout: "Layout", near: tuple["Plan", ...]
) -> "Simulation | None":
    """None for engines that have no dry run, where none was asked for, and of steps that it does not make."""
    special = request.config.engine.optimizer_in_backward or extra_passes(request.config.train) > 0
    if not request.simulated or special or layout.kind not in ("single", *SHARDED):
        return None
    from stablelm.plan.simulate import on_other_ranks, simulate

    for plan in near:
        if plan.simulation is not None:
            found = on_other_ranks(plan.simulation, (plan.request.config, plan.layout), request.config, listed, layout)
            if found is not None:
                return found
    return simulate(request.config, listed, layout, nodes=request.nodes)
