"""What each method costs: time of a training step against pre_ln at equal parameters, and Catformer's memory.

    python benchmarks/methods.py [--shape 24x512x2x512 ...] [--precision bf16] [--compile] [--rounds 20] [--out FILE]
    python benchmarks/methods.py --memory [--shape 24x512x2x512 ...] [--precision bf16] [--out FILE]

A step is forward, backward, clip, AdamW and the refresh of spectral norms; all models take turns on the same batch,
and ratios are of one round. Much of what a method adds lies below the noise of a step, so the added code alone is
timed too, as eager code even with --compile: forward and backward, less what pre_ln does in its place, as a share of
that round's step of pre_ln. Medians come with their quartiles.

--memory gives the activations of all layers, at the depth asked for and at twice that: what the forward pass saves,
each storage once, parameters left out (but bf16 copies of them counted); and the most that both passes hold at once
above parameters and gradients, which adds the largest temporaries.
"""

import argparse
import gc
import json
import statistics
import sys
from typing import Any

import torch
from added_code import Shape, Work, added_code
from chunked_loss import peak_memory, seconds
from out_path import out_path
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.process.torch_settings import arrange_heap
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine

BASE = "pre_ln"
METHODS = (BASE, "deepscalelm_pre", "magneto", "sigma_reparam", "catformer")
# Activations are those of the layers: the gradient of a large embedding would hide them.
MEMORY_VOCABULARY = 64

Records = list[dict[str, Any]]


def build(method: str, shape: Shape, options: argparse.Namespace, *, train: bool = True) -> TorchEngine:
    """A method's model and optimizer; activation, heads and vocabulary are the same for all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of(method, shape, options)
    arrange_heap(config, device)
    return TorchEngine(config, "single", Ranks(0, 1, device, None, None), train=train)


def config_of(method: str, shape: Shape, options: argparse.Namespace) -> Config:
    settings = {
        "model.method": method,
        "model.n_layers": shape.n_layers,
        "model.d_model": shape.d_model,
        "model.n_heads": max(1, shape.d_model // 64),
        "model.activation": "gelu",
        "data.seq_len": shape.seq_len,
        "train.steps": 1,
        "train.global_batch_size": shape.batch,
        "train.precision": options.precision,
        "train.compile": str(options.compile).lower(),
    }
    loaded = load([], [f"{key}={value}" for key, value in settings.items()])
    return resolve(loaded.config, pieces=options.vocab, world_size=1, accelerate_precision=None)


def text_of(shape: Shape, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (shape.batch, shape.seq_len + 1), generator=torch.Generator().manual_seed(0))


def step_of(engine: TorchEngine, text: Tensor) -> Work:
    def step() -> None:
        sums = engine.loss(text[:, :-1], text[:, 1:])
        engine.backward(sums.total / sums.valid, last=True)
        engine.step(1e-4)

    return step


def time_methods(shape: Shape, options: argparse.Namespace) -> Records:
    """Step times and their ratios to pre_ln, parameters, and the added code alone."""
    engines = {method: build(method, shape, options) for method in METHODS}
    device = engines[BASE].device
    text = text_of(shape, options.vocab).to(device)
    steps = {method: step_of(engine, text) for method, engine in engines.items()}
    added = added_code(engines, shape)
    for work in (*steps.values(), *(piece.work for piece in added), *(p.instead_of for p in added if p.instead_of)):
        work()  # warms up
    took: dict[str, list[float]] = {method: [] for method in METHODS}
    alone: dict[str, list[float]] = {piece.name: [] for piece in added}
    for _ in range(options.rounds):
        for method, step in steps.items():
            took[method].append(seconds(step, device))
        for name, work, instead_of in added:
            alone[name].append(seconds(work, device) - (seconds(instead_of, device) if instead_of else 0.0))
    records = []
    for method, engine in engines.items():
        count = sum(parameter.numel() for parameter in engine.parameters().values())
        records.append(record(method, shape, "parameters", [count], "parameters"))
    for method, values in took.items():
        name = f"{method} compiled" if options.compile else method
        records.append(record(name, shape, "step_seconds", values, "s"))
        records.append(record(name, shape, "step_time_ratio", _ratios(values, took[BASE]), f"of {BASE}"))
    for name, values in alone.items():
        records.append(record(name, shape, "added_seconds", values, "s"))
        records.append(record(name, shape, "added_share", _ratios(values, took[BASE]), f"of {BASE}'s step"))
    return records


def _ratios(values: list[float], base: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, base, strict=True)]


def measure_memory(shape: Shape, options: argparse.Namespace) -> Records:
    """Bytes of activations of Catformer and pre_ln at n_layers and 2 n_layers, and their ratios."""
    records = []
    for method in (BASE, "catformer"):
        found: dict[str, list[int]] = {"saved_activation_bytes": [], "peak_activation_bytes": []}
        for deep in (shape, shape._replace(n_layers=2 * shape.n_layers)):
            engine = build(method, deep, options, train=False)
            text = text_of(deep, options.vocab).to(engine.device)
            for (metric, values), measure in zip(found.items(), (saved_bytes, peak_bytes), strict=True):
                values.append(measure(engine, text))
                records.append(record(method, deep, metric, values[-1:], "bytes"))
        for metric, (once, twice) in found.items():
            records.append(record(f"{method}: depth x 2", shape, f"{metric}_ratio", [twice / once], "ratio"))
    return records


def saved_bytes(engine: TorchEngine, text: Tensor) -> int:
    """What the forward pass keeps for the backward pass, each storage once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in engine.tensors().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = engine.module(text[:, :-1])
    assert hidden.requires_grad  # keeps the graph, so that no address serves twice
    return sum(kept.values())


def peak_bytes(engine: TorchEngine, text: Tensor) -> int:
    """The most that forward and backward hold at once, temporaries too, above parameters and their gradients."""
    for parameter in engine.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    gradient = torch.randn(text.shape[0], text.shape[1] - 1, engine.module.config.d_model, device=engine.device)

    def both() -> None:
        hidden = engine.module(text[:, :-1])
        hidden.backward(gradient.to(hidden.dtype))

    both()  # tables that are made once
    return peak_memory(both, engine.device)


def record(name: str, shape: Shape, metric: str, values: list[float] | list[int], unit: str) -> dict[str, Any]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "name": name,
        "shape": str(shape),
        "metric": metric,
        "median": median,
        "low": low,
        "high": high,
        "unit": unit,
    }


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shapes = "layers x width x batch x sequence length, one after another"
    parser.add_argument("--shape", nargs="+", default=["24x512x2x512"], help=shapes)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each model")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile each layer")
    parser.add_argument("--memory", action="store_true", help="measure activations instead of time")
    parser.add_argument("--out", type=out_path, help="write the records to this JSON file")
    options = parser.parse_args(arguments)
    if options.memory:
        options.vocab, options.compile = MEMORY_VOCABULARY, False
    records = []
    for text in options.shape:
        shape = Shape(*(int(size) for size in text.split("x")))
        records += (measure_memory if options.memory else time_methods)(shape, options)
        gc.collect()  # engines refer to themselves
        torch.compiler.reset()
    for entry in records:
        numbers = "".join(f"{_shown(entry[key]):>16}" for key in ("median", "low", "high"))
        print(f"{entry['name']:34}{entry['shape']:14}{entry['metric']:30}{numbers}  {entry['unit']}")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1:])
