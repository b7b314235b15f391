"""The figures of a plan, and of plans for several numbers of ranks, with their JSON for programs."""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from stablelm.engine.peak_memory.choice import Choice
from stablelm.engine.peak_memory.rank_memory import Layout, Parameter
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.model.memory import layer_memory
from stablelm.plan.collectives import Collectives
from stablelm.plan.largest_depth import LargestDepth
from stablelm.plan.output.run_cost import RunCost, run_cost
from stablelm.plan.remedies import Remedy
from stablelm.plan.request import PlanRequest
from stablelm.plan.simulate import Simulation
from stablelm.plan.step_time import StepTime

OTHER = "other matrices"
KEYS = {"matmul": "products", "memory_bound": "traffic"}
"""Keys of the JSON file that differ from the names of `StepTime`."""

ROLES = {
    "embedding": ("embedding", "position"),
    "attention": ("query", "key", "value", "head_gate", "output"),
    "feed-forward": ("fc1", "gate", "fc2"),
    "head": ("head",),
    "projection": ("projection",),
}


@dataclass(frozen=True)
class Plan:
    """What is known about a run before it starts; bytes are those of rank 0, which has the most."""

    request: PlanRequest
    layout: Layout
    listed: list[Parameter]
    held: Counter[str]
    host: Counter[str]
    peak: Counter[str]
    simulation: Simulation | None
    moved: Collectives
    time: StepTime
    remedy: Remedy | None
    choice: Choice | None
    """Of `engine.recompute: auto`."""
    depth: LargestDepth | None
    """None where it was not asked for."""
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak.total() <= self.request.usable

    @cached_property
    def cost(self) -> RunCost:
        return run_cost(self.request, self.time.tokens_per_second)


@dataclass(frozen=True)
class Comparison:
    """Plans of one run on several numbers of ranks; `problems`: why there is none, by number of ranks."""

    world_sizes: tuple[int, ...]
    plans: dict[int, Plan]
    problems: dict[int, str]
    seconds: float


def by_role(listed: list[Parameter]) -> dict[str, int]:
    """Elements by what they do; vectors are gains of norms, biases and the like."""
    found = dict.fromkeys([*ROLES, OTHER, "vectors"], 0)
    names = {role: name for name, roles in ROLES.items() for role in roles}
    for parameter in listed:
        found[names.get(parameter.role, OTHER) if parameter.is_matrix else "vectors"] += parameter.elements
    return {name: elements for name, elements in found.items() if elements}


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--out` writes: bytes, seconds, hours, dollars and counts as numbers."""
    request, config = plan.request, plan.request.config
    simulation = plan.simulation
    figures = asdict(request.accelerator)
    return {
        "method": config.model.method,
        "n_layers": config.model.n_layers,
        "d_model": config.model.d_model,
        "world_size": request.world_size,
        "accelerator": request.accelerator.name,
        "accelerator_figures": {name: figures[name] for name in figures if name not in ("name", "driver")},
        "engine": asdict(config.engine),
        "shards": plan.layout.shards,
        "replicas": plan.layout.replicas,
        "parameters": {"total": parameter_counts(config.model)["total"], **by_role(plan.listed)},
        "peak_bytes": {"total": plan.peak.total(), **+plan.peak},
        "resting_bytes": dict(+plan.held),
        "host_bytes": dict(+plan.host),
        "activation_bytes": layer_memory.measure(config).kept,
        "simulated_layers": None if simulation is None else simulation.simulated.model.n_layers,
        "exact": None if simulation is None else simulation.exact,
        "collectives": {
            kind: {"count": count, "bytes": plan.moved.bytes[kind]} for kind, count in plan.moved.counts.items()
        },
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "estimated": {KEYS.get(name, name): value for name, value in asdict(plan.time).items()},
        "cost": asdict(plan.cost) | {"price": request.price},
        "fits": plan.fits,
        "recompute_peaks": None if plan.choice is None else plan.choice.peaks,
        "remedy": None if plan.remedy is None else asdict(plan.remedy),
        "largest_depth": None if plan.depth is None else asdict(plan.depth),
        "seconds": plan.seconds,
    }


def comparison_json(found: Comparison) -> dict[str, Any]:
    """What `--out` writes of several numbers of ranks: the plan of each in their order, or why there is none."""
    return {
        "world_sizes": [
            as_json(found.plans[ranks])
            if ranks in found.plans
            else {"world_size": ranks, "problem": found.problems[ranks]}
            for ranks in found.world_sizes
        ],
        "seconds": found.seconds,
    }
