"""A plan as text for the console and the docs, and as JSON for programs."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.plan import layer_memory, rank_memory
from stablelm.plan.collectives import Collectives
from stablelm.plan.rank_memory import Layout, Parameter
from stablelm.plan.remedies import Remedy
from stablelm.plan.request import PlanRequest
from stablelm.plan.simulate import Simulation
from stablelm.plan.step_time import StepTime

RESERVE = 5e9
"""Bytes of a device that tensors cannot use: driver context, NCCL buffers, workspaces, fragments (an assumption)."""

LABELS = {
    "weights": "parameters",
    "masters": "master parameters",
    "moments": "optimizer state",
    "gradients": "gradients",
    "gathered": "gathered parameters",
    "reduced": "reduction buffers",
    "weight_copies": "parameters in the compute dtype",
    "activations": "activations",
    "temporary": "temporary tensors of the backward pass",
    "buffers": "buffers of the model",
    "inputs": "tokens and targets",
}
OTHER = "other matrices"
KEYS = {"matmul": "products", "memory_bound": "traffic"}
"""Keys of the JSON file that differ from the names of `StepTime`."""

ROLES = {
    "embedding": ("embedding", "position"),
    "attention": ("query", "key", "value", "output"),
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
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak.total() <= self.request.accelerator.memory - RESERVE


def by_role(listed: list[Parameter]) -> dict[str, int]:
    """Elements by what they do; vectors are gains of norms, biases and the like."""
    found = dict.fromkeys([*ROLES, OTHER, "vectors"], 0)
    names = {role: name for name, roles in ROLES.items() for role in roles}
    for parameter in listed:
        found[names.get(parameter.role, OTHER) if parameter.is_matrix else "vectors"] += parameter.elements
    return {name: elements for name, elements in found.items() if elements}


def text(plan: Plan) -> str:
    """The plan as text."""
    parts = (_head(plan), _parameters(plan), _memory(plan), _collectives(plan), _time(plan), _verdict(plan))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(plan: Plan) -> list[str]:
    config, request = plan.request.config, plan.request
    model, train, engine = config.model, config.train, config.engine
    micro = rank_memory.micro_batches(config, request.world_size)
    copies = f", {plan.layout.replicas} copies of {plan.layout.shards} shards" if engine.kind == "hsdp" else ""
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    return [
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {model.n_heads} heads, "
        f"vocabulary {model.vocab_size:,}, {train.precision}",
        f"{request.world_size:,} x {request.accelerator.name} on {nodes}, {engine.kind}{copies}; "
        f"recompute {engine.recompute}, offload {engine.offload}, "
        f"units of {_size(engine.unit_bytes)}, prefetch {engine.prefetch}",
        f"per step: {train.global_batch_size:,} sequences of {config.data.seq_len:,} tokens; each rank takes {micro} "
        f"micro-batch{'es' * (micro > 1)} of {train.micro_batch_size}",
        "",
    ]


def _parameters(plan: Plan) -> list[str]:
    roles = by_role(plan.listed)
    total = sum(roles.values())
    rows = [f"  {name:<14}{elements:>16,}{elements / total:>8.1%}" for name, elements in roles.items()]
    return [f"parameters      {total:>16,}", *rows, ""]


def _memory(plan: Plan) -> list[str]:
    config = plan.request.config
    how = "estimated, not simulated" if plan.simulation is None else _simulated(plan)
    rows = [f"peak memory per GPU ({how})"]
    for kind, label in LABELS.items():
        if plan.peak[kind]:
            rows.append(f"  {label:<40}{_size(plan.peak[kind]):>10}")
    rows.append(f"  {'total':<40}{_size(plan.peak.total()):>10}")
    rows.append("memory per GPU before the optimizer update")
    rows += [
        f"  {LABELS[kind]:<40}{_size(plan.held[kind]):>10}" + ("  in host memory" if plan.host[kind] else "")
        for kind in ("weights", "masters", "gradients", "moments")
        if plan.held[kind]
    ]
    rows.append(f"  {'activations of one micro-batch':<40}{_size(layer_memory.measure(config).kept):>10}")
    return [*rows, ""]


def _simulated(plan: Plan) -> str:
    assert plan.simulation is not None
    depth, whole = plan.simulation.simulated.model.n_layers, plan.request.config.model.n_layers
    if depth == whole:
        return "simulated"
    rest = "the others are alike" if plan.simulation.exact else "the others are extrapolated"
    return f"simulated with {depth} layers, {rest}"


def _collectives(plan: Plan) -> list[str]:
    if not plan.moved.counts:
        return ["no collectives", ""]
    rows = [
        f"  {kind.replace('_', '-'):<20}{count:>8,}{_size(plan.moved.bytes[kind]):>12}"
        for kind, count in plan.moved.counts.items()
    ]
    return ["collectives per step, bytes of full tensors", *rows, ""]


def _time(plan: Plan) -> list[str]:
    config, time = plan.request.config, plan.time
    host = f", host {_seconds(time.host)}" if time.host else ""
    network = (
        f"; gathers {_seconds(time.gather)}, reductions {_seconds(time.reduce)}, "
        f"exposed communication {_seconds(time.exposed)}"
    )
    offload = f", offload {_seconds(time.offload)}" if time.offload else ""
    return [
        f"FLOPs: {flops_per_token(config.model, config.data.seq_len):.3e} per token, {time.flops:.3e} per step",
        "estimated step time (a roofline, not a measurement)",
        f"  matmul {_seconds(time.matmul)}, memory-bound ops {_seconds(time.memory_bound)}{host}"
        f"{network if plan.request.world_size > 1 else ''}, update {_seconds(time.update)}{offload}",
        f"  {_seconds(time.total)} per step, {time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}",
        "",
    ]


def _verdict(plan: Plan) -> list[str]:
    accelerator = plan.request.accelerator
    needed = f"{_size(plan.peak.total())} of {_size(accelerator.memory)}, {_size(RESERVE)} of which are reserved"
    if plan.fits:
        return [f"fits: {needed}"]
    remedy = plan.remedy
    if remedy is None:
        return [f"does not fit: {needed}; none of the settings tried makes it fit"]
    ranks = f"--world-size {remedy.world_size}" if remedy.world_size != plan.request.world_size else ""
    changes = " ".join(part for part in (ranks, *remedy.arguments) if part)
    return [f"does not fit: {needed}", f"would fit: {changes} (about {_size(remedy.peak)})"]


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--out` writes: bytes, seconds and counts as numbers."""
    request, config = plan.request, plan.request.config
    simulation = plan.simulation
    return {
        "method": config.model.method,
        "n_layers": config.model.n_layers,
        "d_model": config.model.d_model,
        "world_size": request.world_size,
        "accelerator": request.accelerator.name,
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
        "fits": plan.fits,
        "remedy": None if plan.remedy is None else asdict(plan.remedy),
        "seconds": plan.seconds,
    }


def _size(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
