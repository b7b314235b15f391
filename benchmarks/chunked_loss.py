"""What the chunked cross-entropy saves: peak memory and time of a training step against whole logits.

    python benchmarks/chunked_loss.py [--rounds 5] [--precision bf16] [--recompute full] [--out FILE.json]
    python benchmarks/chunked_loss.py --rows 512,1024,4096 [--compile] [--vocab 128256]

All variants are the same model, weights and optimizer; they take turns in one process. With `--rows` each is a number
of tokens whose logits are held at once, beside the one that the model takes by itself (`stablelm`). Peak memory is what
a step holds above weights, gradients and moments, which exist before it. On the CPU it is the largest sum of the
allocator's own events (torch.profiler): exact to the byte, temporaries inside operations included, and unlike the
resident size of the process blind to what the C library keeps back.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from out_path import out_path
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import apply_method
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.loss import chunked_cross_entropy

OURS, PLAIN = "stablelm", "plain-whole-logits"
Loss = Callable[[Decoder, Tensor, Tensor], Tensor]
UNITS = {"peak_memory_bytes": "bytes", "tokens_per_second": "tokens/s"}


def chunked(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    sums = decoder(tokens, targets)
    return sums.total / sums.valid


def chunks_of(rows: int, compiled: bool) -> Loss:
    """The loss with the logits of so many tokens held at once."""

    def loss(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, weight = decoder(tokens).flatten(0, 1), decoder.head_weight()
        size = rows * len(weight) * hidden.element_size()
        sums = chunked_cross_entropy(hidden, weight, targets.flatten(), chunk_bytes=size, compiled=compiled)
        return sums.total / sums.valid

    return loss


def whole(decoder: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """The loss of a plain model: all logits at once, cross-entropy in fp32."""
    hidden = decoder(tokens)
    logits = F.linear(hidden, decoder.head_weight().to(hidden.dtype)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build(shape: tuple[int, int, int, int], vocab_size: int, options: argparse.Namespace, device: torch.device):
    """(decoder, AdamW) of n_layers x d_model, with gradients and moments allocated."""
    n_layers, d_model, _, seq_len = shape
    heads = max(1, d_model // 64)
    config = apply_method(
        ModelConfig(
            n_layers=n_layers,
            d_model=d_model,
            n_heads=heads,
            kv_heads=heads,
            d_ff=4 * d_model,
            max_seq_len=seq_len,
            vocab_size=vocab_size,
        )
    )
    decoder = Decoder(config, options.precision)
    initialise(decoder, config, 0)
    decoder.to(device)
    decoder.compiled_loss = options.compile
    if options.recompute == "full":
        for layer in decoder.layers:
            layer.forward = _recomputed(layer.forward)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return decoder, torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)


def _recomputed(forward: Callable) -> Callable:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Largest number of bytes that `step` holds at once beyond those allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None
    results: Any = run.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """name -> metric -> one value a round; the variants change their order from round to round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = _parse_shape(options.shape)
    decoder, optimizer = build(shape, options.vocab, options, device)
    text = torch.randint(options.vocab, (shape[2], shape[3] + 1), generator=torch.Generator().manual_seed(0)).to(device)

    def make_step(loss: Loss) -> Callable[[], None]:
        def step() -> None:
            optimizer.zero_grad(set_to_none=False)
            loss(decoder, text[:, :-1], text[:, 1:]).backward()
            optimizer.step()

        return step

    losses = {f"{rows} rows": chunks_of(rows, options.compile) for rows in options.rows} or {PLAIN: whole}
    steps = {name: make_step(loss) for name, loss in ({OURS: chunked} | losses).items()}
    values: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in UNITS} for name in steps}
    for name, step in steps.items():  # also warms up, once the moments exist
        step()
        values[name]["peak_memory_bytes"].append(peak_memory(step, device))
    for round_ in range(options.rounds):
        for name in sorted(steps, reverse=round_ % 2 == 1):
            values[name]["tokens_per_second"].append(shape[2] * shape[3] / seconds(steps[name], device))
    return values


def summarise(values: dict[str, dict[str, list[float]]], shape: str) -> list[dict[str, Any]]:
    """The records of all variants and of their ratios (ours over the others, round by round)."""
    records = []
    for metric, unit in UNITS.items():
        rows = [(name, found[metric], unit) for name, found in values.items()]
        for name, numbers, _ in rows[1:]:
            ratios = [a / b for a, b in zip(values[OURS][metric], numbers, strict=True)]
            rows.append((f"{OURS} / {name}", ratios, "ratio"))
        for name, numbers, its_unit in rows:
            spread = {"median": statistics.median(numbers), "low": min(numbers), "high": max(numbers)}
            records.append({"name": name, "shape": shape, "metric": metric, **spread, "unit": its_unit})
    return records


def _parse_shape(text: str) -> tuple[int, int, int, int]:
    layers, width, batch, seq_len = (int(part) for part in text.split("x"))
    return layers, width, batch, seq_len


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="12x384x8x512", help="layers x width x batch x sequence length")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--recompute", choices=("none", "full"), default="none")
    parser.add_argument("--rows", type=_sizes, default=[], help="tokens of a chunk to compare, separated by commas")
    parser.add_argument("--compile", action="store_true", help="compile what follows the logits, as on a GPU")
    parser.add_argument("--out", type=out_path, help="write the records to this JSON file")
    options = parser.parse_args(arguments)
    records = summarise(measure(options), options.shape)
    for record in records:
        numbers = "".join(f"{record[key]:>18,.3f}" for key in ("median", "low", "high"))
        print(f"{record['name']:32}{record['metric']:20}{numbers}  {record['unit']}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
