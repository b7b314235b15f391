"""From a configuration to a plan of its run on any number of accelerators, in one CPU process and without data."""

import json
import sys
from typing import TYPE_CHECKING

from stablelm.config.load import load
from stablelm.config.schema import Config
from stablelm.out_file import check_out, write_out
from stablelm.plan.request import PlanRequest, prepare
from stablelm.process_exit import exit_code_of

if TYPE_CHECKING:
    from stablelm.plan.plan_report import Plan


def plan(
    files: list[str],
    overrides: list[str],
    *,
    world_size: int,
    gpu: str,
    gpus_per_node: int,
    out: str | None = None,
    simulated: bool = True,
) -> int:
    """Prints the plan and writes it as JSON to `out`; returns the exit code.

    Without `simulated` no engine is simulated: quicker, less exact.
    """

    def check() -> PlanRequest:
        loaded = load(files, overrides, world_size=max(1, world_size))
        request = prepare(loaded, world_size, gpu, gpus_per_node, simulated=simulated)
        check_out(out)
        return request

    return exit_code_of(check, lambda request: _run(request, out))


def _run(request: PlanRequest, out: str | None) -> None:
    import warnings

    from stablelm.plan.plan_report import as_json, text

    with warnings.catch_warnings():
        # FSDP and the hooks of a simulation warn about what the real engine does on purpose.
        warnings.simplefilter("ignore")
        made = make(request)
    print(text(made), end="", flush=True)
    if out is not None:
        write_out(out, json.dumps(as_json(made), indent=1, allow_nan=False) + "\n")
        print(f"written: {out}", file=sys.stderr)


def make(request: PlanRequest) -> "Plan":
    """The plan of a checked request."""
    import time

    from stablelm.config.engine_rules import SHARDED
    from stablelm.plan import estimate, rank_memory, remedies
    from stablelm.plan.collectives import collectives
    from stablelm.plan.plan_report import RESERVE, Plan
    from stablelm.plan.step_time import step_time

    started = time.perf_counter()
    config, world = request.config, request.world_size

    def layout_of(of: Config, ranks: int) -> rank_memory.Layout:
        return rank_memory.make_layout(of, of.engine.kind, ranks, max(1, ranks // request.gpus_per_node))

    listed, layout = rank_memory.parameters(config), layout_of(config, world)
    simulation = None
    if request.simulated and config.engine.kind in ("single", *SHARDED):
        from stablelm.plan.simulate import simulate

        simulation = simulate(config, listed, layout, nodes=request.nodes)
    held = rank_memory.resting(config, listed, layout)
    host = rank_memory.on_host(config, listed, layout, held)
    # The simulation offloads nothing, its only device being the CPU.
    peak = estimate.peak(config, listed, layout) if simulation is None else simulation.peak - host
    moved = collectives(config, listed, layout)
    time_of_step = step_time(
        config, listed, layout, moved, request.accelerator, gpus_per_node=request.gpus_per_node,
        operations=None if simulation is None else simulation.operations,
    )  # fmt: skip
    limit = request.accelerator.memory - RESERVE
    remedy = None
    if peak.total() > limit:
        scale = peak.total() / estimate.peak(config, listed, layout).total()
        remedy = remedies.first_that_fits(config, listed, world, limit, scale, layout_of)
    return Plan(
        request, layout, listed, held, host, peak, simulation, moved, time_of_step, remedy,
        time.perf_counter() - started,
    )  # fmt: skip
