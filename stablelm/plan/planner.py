"""From a configuration to a plan of its run on any number of accelerators, in one CPU process and without data."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stablelm.config import rules
from stablelm.config.load import Loaded, load
from stablelm.config.schema import Config
from stablelm.engine.environment import AccelerateFlags, engine_kind
from stablelm.errors import ConfigError, StorageError
from stablelm.plan.accelerators import Accelerator, find
from stablelm.train.start import exit_code_of

if TYPE_CHECKING:
    from stablelm.plan.plan_report import Plan


@dataclass(frozen=True)
class Request:
    """What to plan, checked: `config` is resolved and its `engine.kind` concrete."""

    config: Config
    world_size: int
    accelerator: Accelerator
    gpus_per_node: int
    simulated: bool

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.gpus_per_node)


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
    """Prints the plan, writes it as JSON to `out`; returns the exit code."""

    def check() -> Request:
        loaded = load(files, overrides, world_size=max(1, world_size))
        request = prepare(loaded, world_size, gpu, gpus_per_node, simulated=simulated)
        if out is not None:
            _check_out(Path(out))
        return request

    return exit_code_of(check, lambda request: _run(request, out))


def prepare(loaded: Loaded, world_size: int, gpu: str, gpus_per_node: int, *, simulated: bool = True) -> Request:
    """Checks the arguments and resolves the configuration for that many ranks; ConfigError in one sentence a mistake.

    The tokenizer is read only where `model.vocab_size` is left to it.
    """
    accelerator = find(gpu)
    for name, value in (("--world-size", world_size), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if world_size > gpus_per_node and world_size % gpus_per_node:
        raise ConfigError(
            f"--world-size {world_size} does not fill nodes of --gpus-per-node {gpus_per_node}; "
            f"use {world_size // gpus_per_node * gpus_per_node} or {-(-world_size // gpus_per_node) * gpus_per_node}"
        )
    config = loaded.config
    kind = engine_kind(config.engine.kind, AccelerateFlags(), world_size)
    config = replace(config, engine=replace(config.engine, kind=kind))
    rules.check(config, world_size, None, loaded.origins)
    config = rules.resolve(
        config, pieces=_pieces(config), world_size=world_size, accelerate_precision=None, origins=loaded.origins
    )
    return Request(config, world_size, accelerator, gpus_per_node, simulated)


def _pieces(config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from stablelm.data.embedded import embedded
    from stablelm.data.tokenizer import Tokenizer

    data = config.data
    return Tokenizer(embedded(data.cache).tokenizer if data.tokenizer == "embedded" else data.tokenizer).pieces


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name a file")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out} lies in a directory that does not exist; create {out.parent} first")


def _run(request: Request, out: str | None) -> None:
    import warnings

    from stablelm.plan.plan_report import as_json, text

    with warnings.catch_warnings():
        # FSDP and the hooks of a simulation warn of what the real engine does on purpose.
        warnings.simplefilter("ignore")
        made = make(request)
    print(text(made), end="", flush=True)
    if out is not None:
        try:
            Path(out).write_text(json.dumps(as_json(made), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise StorageError(f"--out {out} cannot be written: {error.strerror}") from error
        print(f"written: {out}", file=sys.stderr)


def make(request: Request) -> "Plan":
    """The plan of a checked request."""
    import time

    from stablelm.config.engine_rules import SHARDED
    from stablelm.plan import estimate, memory, remedies
    from stablelm.plan.collectives import collectives
    from stablelm.plan.plan_report import RESERVE, Plan
    from stablelm.plan.step_time import step_time

    started = time.perf_counter()
    config, world = request.config, request.world_size

    def layout_of(of: Config, ranks: int) -> memory.Layout:
        return memory.make_layout(of, of.engine.kind, ranks, max(1, ranks // request.gpus_per_node))

    listed, layout = memory.parameters(config), layout_of(config, world)
    closed, simulation = estimate.peak(config, listed, layout), None
    if request.simulated and config.engine.kind in ("single", *SHARDED):
        from stablelm.plan.simulate import simulate

        simulation = simulate(config, listed, layout, nodes=request.nodes)
    held = memory.resting(config, listed, layout)
    host = memory.on_host(config, listed, layout, held)
    # A simulated rank has no other memory: what is offloaded leaves the device by the closed form.
    peak = closed if simulation is None else simulation.peak - host
    moved = collectives(config, listed, layout)
    time_of_step = step_time(
        config, listed, layout, moved, request.accelerator, gpus_per_node=request.gpus_per_node,
        operations=None if simulation is None else simulation.operations,
    )  # fmt: skip
    limit = request.accelerator.memory - RESERVE
    remedy = None
    if peak.total() > limit:
        scale = peak.total() / closed.total()
        remedy = remedies.first_that_fits(config, listed, world, limit, scale, layout_of)
    return Plan(
        request, layout, listed, held, host, peak, simulation, moved, time_of_step, remedy,
        time.perf_counter() - started,
    )  # fmt: skip
