"""Which operators the time of a training step goes to, at the shapes of train_step.py.

    python benchmarks/step_profile.py [--shape 12x384x4x512 ...] [--mode eager compiled] [--method pre_ln]
        [--precision bf16] [--out FILE.json]

Self CPU time of each operator over a few steps after the warm-up, as a share of all (torch.profiler). What a compiled
layer fuses appears as one kernel; the rest of what is listed is the same in both modes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.out_path import out_path
from benchmarks.train_step import MODES, SHAPES, shape_of
from benchmarks.training.contestants import Setting, stablelm
from benchmarks.training.shape import Shape

WARM_UP, STEPS, SHOWN = 3, 3, 12
OWN_GRAPH = "compiled graphs, fused kernels"


def operators(shape: Shape, options: argparse.Namespace, *, compiled: bool) -> list[dict[str, Any]]:
    """The largest shares, largest first, then all others together."""
    setting = Setting(shape, options.vocab, options.precision, compiled, torch.device("cpu"))
    trainer = stablelm(setting, **{"model.method": options.method})
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(options.vocab, (shape.batch, shape.seq_len + 1), generator=draw)
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    for _ in range(WARM_UP):
        trainer.step(tokens, targets)
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(STEPS):
            trainer.step(tokens, targets)
    spent: dict[str, float] = {}
    calls: dict[str, int] = {}
    for event in run.key_averages():
        graph = event.key.startswith(("## Call CompiledFxGraph", "CompiledFunction", "Torch-Compiled", "graph_"))
        name = OWN_GRAPH if graph else event.key
        spent[name] = spent.get(name, 0.0) + event.self_cpu_time_total
        calls[name] = calls.get(name, 0) + event.count
    names, total = sorted(spent, key=lambda name: -spent[name]), sum(spent.values())
    rows = [(name, spent[name], calls[name]) for name in names[:SHOWN]]
    rest = names[SHOWN:]
    rows.append(("all others", sum(spent[name] for name in rest), sum(calls[name] for name in rest)))
    mode = MODES[compiled]
    return [
        {
            "shape": str(shape),
            "mode": mode,
            "operator": name,
            "share": time / total,
            "milliseconds": time / STEPS / 1000,
            "calls": count / STEPS,
        }
        for name, time, count in rows
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", type=shape_of, default=[shape_of(each) for each in SHAPES])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--method", default="pre_ln")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--out", type=out_path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for shape in options.shape:
        for mode in options.mode:
            rows += operators(shape, options, compiled=mode == "compiled")
            torch.compiler.reset()
    for row in rows:
        figures = f"{row['milliseconds']:>12.1f} ms{row['share']:>8.1%}{row['calls']:>9.0f}"
        print(f"{row['shape']:14}{row['mode']:10}{row['operator']:60}{figures}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
