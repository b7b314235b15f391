"""How a plan is shown: text for the console and the pages, JSON for programs."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from stablelm.model.flops import flops_per_token, parameter_counts
from stablelm.plan import activations, memory
from stablelm.plan.collectives import Collectives
from stablelm.plan.memory import Layout, Parameter
from stablelm.plan.remedies import Remedy
from stablelm.plan.step_time import StepTime

if TYPE_CHECKING:
    from stablelm.plan.planner import Request
    from stablelm.plan.simulate import Simulation

RESERVE = 5e9
"""Bytes of a device that tensors do not get: driver context, NCCL's buffers, workspaces, fragments (an assumption)."""

MEANINGS = {
    "weights": "shard of the weights",
    "masters": "shard of the weights that Adam updates",
    "moments": "shard of Adam's moments",
    "gradients": "gradients, shards and those still adding up",
    "gathered": "units gathered, buffers of gathers",
    "reduced": "buffers of reductions",
    "weight_copies": "weights in the compute dtype",
    "activations": "activations and the loss's gradients",
    "loss_chunk": "logits of a chunk",
    "temporary": "temporary tensors, gradients on their way",
    "buffers": "buffers that are state",
    "inputs": "tokens and targets",
}
ROLES = {
    "embedding": ("embedding", "position"),
    "attention": ("query", "key", "value", "output"),
    "feed-forward": ("fc1", "gate", "fc2"),
    "head": ("head",),
    "projection": ("projection",),
}


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts; bytes are of rank 0, which has the most."""

    request: "Request"
    layout: Layout
    listed: list[Parameter]
    held: Counter[str]
    host: Counter[str]
    peak: Counter[str]
    simulation: "Simulation | None"
    moved: Collectives
    time: StepTime
    remedy: Remedy | None
    seconds: float

    @property
    def fits(self) -> bool:
        return self.peak.total() <= self.request.accelerator.memory - RESERVE


def by_role(listed: list[Parameter]) -> dict[str, int]:
    """Elements by what they do; vectors (gains of norms, biases, gammas) together."""
    found = dict.fromkeys([*ROLES, "vectors"], 0)
    places = {role: name for name, roles in ROLES.items() for role in roles}
    for parameter in listed:
        found[places[parameter.role] if parameter.is_matrix else "vectors"] += parameter.elements
    return {name: elements for name, elements in found.items() if elements}


def text(plan: Plan) -> str:
    """The plan in words and columns."""
    parts = (_head(plan), _parameters(plan), _memory(plan), _collectives(plan), _time(plan), _verdict(plan))
    return "\n".join(line for part in parts for line in part) + "\n"


def _head(plan: Plan) -> list[str]:
    config, request = plan.request.config, plan.request
    model, train, engine = config.model, config.train, config.engine
    micro = memory.micro_batches(config, request.world_size)
    copies = f", {plan.layout.replicas} copies of {plan.layout.shards} shards" if engine.kind == "hsdp" else ""
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    return [
        f"{model.method}, {model.n_layers} layers x {model.d_model}, {model.n_heads} heads, "
        f"vocabulary {model.vocab_size:,}, {train.precision}",
        f"{request.world_size:,} x {request.accelerator.name} on {nodes}, {engine.kind}{copies}; "
        f"recompute {engine.recompute}, offload {engine.offload}, "
        f"units of {_size(engine.unit_bytes)}, prefetch {engine.prefetch}",
        f"a step: {train.global_batch_size:,} sequences of {config.data.seq_len:,} tokens; a rank takes {micro} "
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
    how = "closed form" if plan.simulation is None else _simulated(plan)
    rows = [f"memory of a rank at its fullest ({how})"]
    for kind, meaning in MEANINGS.items():
        if plan.peak[kind]:
            rows.append(f"  {meaning:<46}{_size(plan.peak[kind]):>10}")
    rows.append(f"  {'together':<46}{_size(plan.peak.total()):>10}")
    rows.append("before the update a rank holds")
    rows += [
        f"  {MEANINGS[kind]:<46}{_size(plan.held[kind]):>10}" + ("  in host memory" if plan.host[kind] else "")
        for kind in ("weights", "masters", "gradients", "moments")
        if plan.held[kind]
    ]
    rows.append(f"  {'activations kept of a micro-batch':<46}{_size(activations.kept(config)):>10}")
    return [*rows, ""]


def _simulated(plan: Plan) -> str:
    assert plan.simulation is not None
    depth, whole = plan.simulation.simulated.model.n_layers, plan.request.config.model.n_layers
    if depth == whole:
        return "simulated"
    return f"simulated with {depth} layers, {'the rest are alike' if plan.simulation.exact else 'an estimate for all'}"


def _collectives(plan: Plan) -> list[str]:
    if not plan.moved.counts:
        return ["no collectives", ""]
    rows = [
        f"  {kind.replace('_', '-'):<20}{count:>8,}{_size(plan.moved.bytes[kind]):>12}"
        for kind, count in plan.moved.counts.items()
    ]
    return ["collectives of a step, bytes of the whole tensors", *rows, ""]


def _time(plan: Plan) -> list[str]:
    config, time = plan.request.config, plan.time
    host = f", host {_seconds(time.host)}" if time.host else ""
    wires = (
        f"; gathers {_seconds(time.gather)}, reductions {_seconds(time.reduce)}, not hidden {_seconds(time.exposed)}"
    )
    offload = f", offload {_seconds(time.offload)}" if time.offload else ""
    return [
        f"operations: {flops_per_token(config.model, config.data.seq_len):.3e} a token, {time.flops:.3e} a step",
        "estimated step (a roofline, not a measurement)",
        f"  products {_seconds(time.products)}, other traffic {_seconds(time.traffic)}{host}"
        f"{wires if plan.request.world_size > 1 else ''}, update {_seconds(time.update)}{offload}",
        f"  {_seconds(time.total)} a step, {time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}",
        "",
    ]


def _verdict(plan: Plan) -> list[str]:
    accelerator = plan.request.accelerator
    needed = f"{_size(plan.peak.total())} of {_size(accelerator.memory)}, {_size(RESERVE)} of which are kept free"
    if plan.fits:
        return [f"fits: {needed}"]
    remedy = plan.remedy
    if remedy is None:
        return [f"does not fit: {needed}; nothing that was tried helps"]
    ranks = f"--world-size {remedy.world_size}" if remedy.world_size != plan.request.world_size else ""
    changes = " ".join(part for part in (ranks, *remedy.arguments) if part)
    return [f"does not fit: {needed}", f"would fit: {changes} (about {_size(remedy.peak)})"]


def as_json(plan: Plan) -> dict[str, Any]:
    """What `--out` writes: bytes, seconds and counts as plain numbers."""
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
        "activation_bytes": activations.kept(config),
        "simulated_layers": None if simulation is None else simulation.simulated.model.n_layers,
        "exact": None if simulation is None else simulation.exact,
        "collectives": {
            kind: {"count": count, "bytes": plan.moved.bytes[kind]} for kind, count in plan.moved.counts.items()
        },
        "flops_per_token": flops_per_token(config.model, config.data.seq_len),
        "estimated": asdict(plan.time),
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
