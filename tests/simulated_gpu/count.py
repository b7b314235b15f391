"""Counts a layer's kernels and bytes on a simulated GPU: the difference of two depths, bf16, eager, no optimizer.

    python tests/simulated_gpu/count.py [key=value ...] [ranks=8] [--top 20]

Of 4 sequences of 2,048 tokens at d_model 1,024 unless keys say otherwise. kB are 1,024 bytes a token.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]
    from simulated_gpu import fake_cuda

    fake_cuda.load()

from simulated_gpu.recorder import Launch, Record
from simulated_gpu.simulation import configuration, prepare, simulate

SHAPE = (
    *("model.d_model=1024", "model.n_heads=16", "data.seq_len=2048"),
    *("train.global_batch_size=4", "train.micro_batch_size=4"),
)
DEPTHS, PIECES = (4, 6), 32000
LAYERS = DEPTHS[1] - DEPTHS[0]
BOTH = ("forward", "backward")


def of_layers(*overrides: str, lines: bool = False) -> tuple[Record, int]:
    """What `LAYERS` more layers add to a step, and the tokens of the step on a rank times these layers."""
    named = {each.split("=")[0] for each in overrides}
    keys = [*(each for each in SHAPE if each.split("=")[0] not in named), *overrides]
    few, many = (simulate(*keys, f"model.n_layers={depth}", pieces=PIECES, lines=lines) for depth in DEPTHS)
    for target, less in ((many.launches, few.launches), (many.bytes, few.bytes)):
        target.subtract(less)
        for launch in [launch for launch in target if launch.phase == "build"]:
            del target[launch]
    config, world = configuration([*keys, f"model.n_layers={DEPTHS[0]}"])
    return many, config.train.batch_sizes.largest // world * config.data.seq_len * LAYERS


def table(record: Record, tokens: int, top: int) -> str:
    """Of a layer, by phase, then the kernels and the lines with most bytes and most launches."""
    rows = ["phase       launches   kB/token pointwise"]
    for name, phases in {**{phase: (phase,) for phase in (*BOTH, "update")}, "fwd + bwd": BOTH}.items():
        kilobytes = record.pointwise_bytes(*phases) / 1024 / tokens
        rows.append(f"{name:10} {record.count(*phases) / LAYERS:9g} {kilobytes:12.1f}")
    largest = Counter({launch: size for launch, size in record.bytes.items() if not launch.is_matrix})
    order = [launch for launch, _ in largest.most_common(top)]
    order += [launch for launch, _ in record.launches.most_common(top) if launch not in order]
    rows += [_row(launch, record, tokens) for launch in order if record.launches[launch]]
    return "\n".join(rows)


def _row(launch: Launch, record: Record, tokens: int) -> str:
    launches, kilobytes = record.launches[launch] / LAYERS, record.bytes[launch] / 1024 / tokens
    return f"{launch.phase:10} {launches:6g} {kilobytes:9.1f}  {launch.name:34} {launch.place}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--top", type=int, default=20, help="rows of the most expensive kernels")
    arguments = parser.parse_args()
    prepare()
    record, tokens = of_layers(*arguments.overrides, lines=True)
    print(table(record, tokens, arguments.top))


if __name__ == "__main__":
    main()
