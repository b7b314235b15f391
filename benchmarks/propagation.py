"""Theory against measurement at initialisation, over methods, depths and seeds: a table of predicted / measured.

    python benchmarks/propagation.py [--shapes 12x256,48x256,192x256,1000x64] [--methods pre_ln,...|all] [--seeds 4]
        [--out docs/propagation.json --table docs/propagation.md] [KEY=VALUE ...]

Text is the embedded corpus unless data.path says otherwise, each seed its own windows and weights; KEY=VALUE sets what
all methods share. A method that refuses the shape or a key is left out, with its reason. A method, shape and seed that
`--out` holds already is not measured again, so the whole may be stopped and started at will. The last column says
whether predicted / measured is within .7 to 1.4 for the stream and .6 to 1.6 for branches at every layer.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from out_path import out_path

from stablelm.config.load import load
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS as CATALOGUE
from stablelm.probe.measure import measure
from stablelm.probe.predict import predict
from stablelm.probe.prober import ProbeRequest, collision_of, prepare
from stablelm.train.job import first_rows

METHODS = "pre_ln,post_ln,deepscalelm_pre,deepscalelm_post,magneto,sigma_reparam,catformer,deepnorm"
SHAPES = "12x256,48x256,192x256,1000x64"
FIGURES = ("stream_variance", "attention_branch_variance", "feedforward_branch_variance", "token_correlation")

BANDS = dict(zip(FIGURES, ((0.7, 1.4), (0.6, 1.6), (0.6, 1.6)), strict=False))


def request(method: str, shape: str, seed: int, options: argparse.Namespace) -> ProbeRequest:
    """What to probe: a method at n_layers x d_model, heads of 32 features."""
    n_layers, d_model = map(int, shape.split("x"))
    keys = {
        "run.seed": seed,
        "model.method": method,
        "model.n_layers": n_layers,
        "model.d_model": d_model,
        "model.n_heads": max(1, d_model // 32),
        "data.seq_len": options.seq_len,
        "data.lanes": 8,
        "train.global_batch_size": options.sequences,
        "train.steps": 1,
    }
    loaded = load([], [f"{name}={value}" for name, value in keys.items()] + options.keys)
    return prepare(loaded, None, options.sequences, options.seq_len)


def one(method: str, shape: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measured and predicted figures at every boundary for one seed."""
    prepared = request(method, shape, seed, options).prepared
    tokens, targets = first_rows(prepared, options.sequences, options.seq_len)
    model = prepared.config.model
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            model,
            tokens,
            targets,
            precision="fp32",
            seed=seed,
            pieces=prepared.tokenizer.pieces,
            folder=Path(folder),
        ).internals
    middle = time.perf_counter()
    theory = predict(model, seq_len=options.seq_len, tokens=tokens.numel(), collision=collision_of(tokens))
    row = {"method": method, "shape": shape, "seed": seed}
    row |= {"measure_seconds": middle - started, "predict_seconds": time.perf_counter() - middle}
    names = (*FIGURES, "gradient_norm")
    return row | {name: [_list(getattr(theory, name)), _list(getattr(found, name))] for name in names}


def _list(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one method and shape, and the worst predicted / measured of a layer.

    Ratios are of the means over seeds: of arithmetic ones, of geometric ones for gradients, whose logs are normal.
    """

    def mean(name: str, which: int) -> np.ndarray:
        values = np.array([row[name][which] for row in rows])
        return np.exp(np.log(values).mean(axis=0)) if name == "gradient_norm" else values.mean(axis=0)

    found: dict[str, Any] = {}
    for name in FIGURES[:3]:
        ratio = (mean(name, 0) / mean(name, 1))[1:]
        found[name] = (mean(name, 0)[-1], mean(name, 1)[-1], ratio.min(), ratio.max())
    predicted, measured = mean("token_correlation", 0), mean("token_correlation", 1)
    difference = predicted - measured
    found["token_correlation"] = (predicted[-1], measured[-1], difference.min(), difference.max())
    ratios = [gradient[1] / gradient[-1] for gradient in (mean("gradient_norm", 0), mean("gradient_norm", 1))]
    spread = mean("gradient_norm", 0) / mean("gradient_norm", 1)
    found["gradient_norm"] = (*ratios, spread.min(), spread.max())
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each method and shape."""
    head = (
        "| method | shape | seeds | stream variance at the end | attention branch, layers "
        "| feed-forward branch, layers | token correlation at the end | gradient norm, layer 1 / last | within |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    lines = []
    for method, shape in dict.fromkeys((row["method"], row["shape"]) for row in rows):
        own = [row for row in rows if (row["method"], row["shape"]) == (method, shape)]
        s = summary(own)
        branches = " | ".join(_range(*s[name][2:]) for name in FIGURES[1:3])
        ends = [_cell(s[name]) for name in ("stream_variance", "token_correlation", "gradient_norm")]
        lines.append(
            f"| `{method}` | {shape} | {len(own)} | {ends[0]} | {branches} | {ends[1]} | {ends[2]} | {_within(s)} |"
        )
    return head + "\n".join(lines) + "\n"


def _range(low: float, high: float) -> str:
    return "-" if np.isnan(low) else f"{low:.2f} to {high:.2f}"


def _within(found: dict[str, Any]) -> str:
    """Whether the predictions that there are lie in BANDS; those there are none of are named."""
    ranges = {name: found[name][2:] for name in BANDS}
    missing = [name.removesuffix("_variance").replace("_", " ") for name in BANDS if np.isnan(ranges[name][0])]
    inside = all(
        ranges[name][0] >= low and ranges[name][1] <= high
        for name, (low, high) in BANDS.items()
        if not np.isnan(ranges[name][0])
    )
    return ("yes" if inside else "no") + (f", no prediction: {', '.join(missing)}" if missing else "")


def _cell(figures: tuple[float, float, float, float]) -> str:
    """Predicted / measured and the range over layers; `-` where there is no prediction."""
    predicted, measured, low, high = figures
    if np.isnan(predicted):
        return f"- / {measured:.3g}"
    return f"{predicted:.3g} / {measured:.3g} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--out", type=out_path, default="propagation.json", help="one JSON object a line")
    parser.add_argument("--table", help="a Markdown file for the table")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of the configuration, for all methods")
    options = parser.parse_args()
    methods = list(CATALOGUE) if options.methods == "all" else options.methods.split(",")
    out = Path(options.out)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["method"], row["shape"], row["seed"]) for row in rows}
    for shape in options.shapes.split(","):
        for seed in range(options.seeds):
            for method in methods:
                if (method, shape, seed) in done:
                    continue
                try:
                    rows.append(one(method, shape, seed, options))
                except ConfigError as reason:
                    print(f"{method} {shape} is left out: {reason}", flush=True)
                    continue
                with out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{method} {shape} seed {seed}: {rows[-1]['measure_seconds']:.1f} s", flush=True)
    text = table(rows)
    print(text)
    if options.table:
        Path(options.table).write_text(text)


if __name__ == "__main__":
    main()
