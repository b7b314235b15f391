"""A plan as text for the console and the docs, in 80 columns: first the answers, then what they come from."""

from stablelm.config.memory_rules import RESERVE
from stablelm.engine.peak_memory import rank_memory
from stablelm.methods.sizes import flops_per_token
from stablelm.model.memory import layer_memory
from stablelm.plan.output.figures import Plan, by_role
from stablelm.plan.output.units import duration, folded, money, number, seconds, size

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
AT = 15
"""Column at which the answers start."""


def text(plan: Plan) -> str:
    """The plan as text."""
    parts = (_run(plan), _answers(plan), _parameters(plan), _memory(plan), _collectives(plan), _time(plan))
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _fields(found: dict[str, str]) -> list[str]:
    return [line for name, words in found.items() for line in folded(f"{name:<{AT}}{words}", AT)]


def _run(plan: Plan) -> list[str]:
    config, request = plan.request.config, plan.request
    model, train, engine, gpu = config.model, config.train, config.engine, request.accelerator
    micro = rank_memory.micro_batches(config, request.world_size)
    copies = f", {plan.layout.replicas} copies of {plan.layout.shards} shards" if engine.kind == "hsdp" else ""
    return _fields(
        {
            "model": f"{model.method}, {model.n_layers} layers x {model.d_model}, {model.n_heads} heads, "
            f"vocabulary {model.vocab_size:,}",
            "hardware": f"{request.world_size:,} x {gpu.name} on {request.nodes:,} "
            f"node{'s' * (request.nodes > 1)}, training in {train.precision}",
            "rates": f"{gpu.peak / 1e12:g} TFLOPS bf16; GB/s: memory {gpu.memory_bandwidth / 1e9:,g}, "
            f"links {gpu.link / 1e9:,g}, network {gpu.network / 1e9:,g}",
            "engine": f"{engine.kind}{copies}, recompute {engine.recompute}, offload {engine.offload}, "
            f"{size(engine.unit_bytes)} units, prefetch {engine.prefetch}",
            **({} if plan.choice is None else {"recompute auto": plan.choice.words()}),
            "batch": f"{request.batch} of {config.data.seq_len:,} tokens; per GPU {micro:,} "
            f"micro-batch{'es' * (micro > 1)} of {train.micro_batch_size:,}",
        }
    )


def _answers(plan: Plan) -> list[str]:
    request, cost = plan.request, plan.cost
    found = {"fits": _fits(plan)}
    if plan.remedy is not None:
        found["would fit"] = _changes(plan)
    if plan.depth is not None:
        found["largest depth"] = _depth(plan)
    found["time"] = f"{duration(cost.hours)} for {cost.tokens:,} tokens in {cost.steps:,} steps (estimate)"
    found["cost"] = f"{number(cost.gpu_hours)} GPU-hours; "
    if request.price is None or cost.dollars is None:
        found["cost"] += "in dollars with --price"
    else:
        found["cost"] += f"{money(cost.dollars)} at {money(request.price)} per GPU-hour"
    found["energy"] = "unknown without --watts"
    if cost.kilowatt_hours is not None:
        watts = f"{request.accelerator.power:,.0f} W per GPU"
        found["energy"] = f"at most {number(cost.kilowatt_hours)} kWh ({watts}; host and cooling not counted)"
    return _fields(found)


def _fits(plan: Plan) -> str:
    request = plan.request
    needed = f"peak memory {size(plan.peak.total())} of {size(request.accelerator.memory)} per GPU, "
    needed += f"{size(RESERVE)} reserved"
    if plan.fits:
        return f"yes: {needed}"
    return f"no: {needed}" + ("; none of the settings tried makes it fit" if plan.remedy is None else "")


def _changes(plan: Plan) -> str:
    remedy = plan.remedy
    assert remedy is not None
    ranks = f"--world-size {remedy.world_size}" if remedy.world_size != plan.request.world_size else ""
    return f"{' '.join(part for part in (ranks, *remedy.arguments) if part)} (about {size(remedy.peak)})"


def _depth(plan: Plan) -> str:
    depth = plan.depth
    assert depth is not None
    if depth.layers == 0:
        return f"not one layer fits at this width, engine and batch; limit: {depth.limit}"
    return f"{depth.layers:,} layers at this width, engine and batch; limit: {depth.limit}"


def _table(rows: list[tuple[str, str, str]], width: int = 40) -> list[str]:
    return [f"  {label:<{width}}{value:>12}{note}".rstrip() for label, value, note in rows]


def _parameters(plan: Plan) -> list[str]:
    roles = by_role(plan.listed)
    total = sum(roles.values())
    rows = [(name, f"{elements:,}", f"{elements / total:>8.1%}") for name, elements in roles.items()]
    return [f"parameters{total:>44,}", *_table(rows)]


def _memory(plan: Plan) -> list[str]:
    config = plan.request.config
    how = "estimated without a dry run" if plan.simulation is None else _dry_run(plan)
    rows = [(label, size(plan.peak[kind]), "") for kind, label in LABELS.items() if plan.peak[kind]]
    rows.append(("total", size(plan.peak.total()), ""))
    resting = [
        (LABELS[kind], size(plan.held[kind]), "  in host memory" if plan.host[kind] else "")
        for kind in ("weights", "masters", "gradients", "moments")
        if plan.held[kind]
    ]
    resting.append(("activations of one micro-batch", size(layer_memory.measure(config).kept), ""))
    before = ["", "memory per GPU before the optimizer update"]
    return [f"peak memory per GPU ({how})", *_table(rows), *before, *_table(resting)]


def _dry_run(plan: Plan) -> str:
    assert plan.simulation is not None
    depth, whole = plan.simulation.simulated.model.n_layers, plan.request.config.model.n_layers
    if depth == whole:
        return "from a dry run"
    rest = "the others are alike" if plan.simulation.exact else "the others are extrapolated"
    return f"from a dry run of {depth} layers; {rest}"


def _collectives(plan: Plan) -> list[str]:
    if not plan.moved.counts:
        return ["no collectives: one GPU"]
    rows = [
        (kind.replace("_", "-"), f"{count:,}", f"{size(plan.moved.bytes[kind]):>14}")
        for kind, count in plan.moved.counts.items()
    ]
    return ["collectives per step: how many, and the bytes of their full tensors", *_table(rows)]


def _time(plan: Plan) -> list[str]:
    config, time = plan.request.config, plan.time
    device = time.matmul + time.memory_bound
    rows = [("matmul", seconds(time.matmul), ""), ("memory-bound ops", seconds(time.memory_bound), "")]
    if time.host > device:
        rows.append(("GPU waits for the host", seconds(time.host - device), f"  host: {seconds(time.host)}"))
    if plan.request.world_size > 1:
        moved = f"  gathers {seconds(time.gather)}, reduces {seconds(time.reduce)}"
        rows.append(("exposed communication", seconds(time.exposed), moved))
    rows.append(("optimizer update", seconds(time.update), ""))
    if time.offload:
        rows.append(("offload", seconds(time.offload), ""))
    rows += [
        ("total", seconds(time.total), ""),
        ("tokens per second, all GPUs", f"{time.tokens_per_second:,.0f}", ""),
        ("MFU", f"{time.mfu:.1%}", ""),
        ("FLOPs per token", f"{flops_per_token(config.model, config.data.seq_len):.3e}", ""),
        ("FLOPs per step, all GPUs", f"{time.flops:.3e}", ""),
    ]
    lines = ["step time per GPU (an estimate from data-sheet rates, not a measurement)", *_table(rows, 28)]
    if config.train.precision != "bf16":
        lines += folded(f"  {config.train.precision} matmuls are slower than the bf16 rate assumed here", 2)
    return lines
