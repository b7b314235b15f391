"""Draws docs/figures/depth.png, the picture at the head of the README: 96 layers that train beside 96 that do not.

    python docs/make_depth_figure.py               draws from docs/figures/depth.json
    python docs/make_depth_figure.py --runs DIR    trains the runs in DIR first: about two minutes each on one core

All runs share text, seed, optimizer and learning rate; only model.method differs. The text comes with Python.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

DATA = ROOT / "docs" / "figures" / "depth.json"
PICTURE = DATA.with_suffix(".png")
LAYERS, WIDTH, STEPS = 96, 64, 160
BIN = 8  # steps to a point of the curve
# Of Okabe and Ito's palette, distinguishable for the colour-blind; the line style repeats the distinction.
STYLES = {
    "deepscalelm_pre": ("DeepScaleLM", "#0072B2", "-"),
    "pre_ln": ("Pre-LN", "#D55E00", "--"),
    "post_ln": ("Post-LN", "#555555", "-."),
}
KEYS = {
    "model.n_layers": LAYERS,
    "model.d_model": WIDTH,
    "model.n_heads": 2,
    "model.activation": "gelu",
    "model.attention.position": "rope",
    "data.path": "embedded",
    "data.tokenizer": "embedded",
    "data.seq_len": 32,
    "data.lanes": 48,
    "train.steps": STEPS,
    "train.global_batch_size": 16,
    "train.lr": 0.003,
    "train.warmup_steps": 16,
    "observe.every": 1,
    "evaluate.every": 0,
    "evaluate.batches": 32,
    "checkpoint.every": 0,
}


def train(method: str, runs: Path) -> dict[str, Any]:
    """Trains one method and returns its curve and final validation loss; raises CalledProcessError if the run fails."""
    from stablelm.observe.sinks import last_records

    run = runs / method
    overrides = [f"{key}={value}" for key, value in KEYS.items()] + [f"model.method={method}", f"run.dir={run}"]
    subprocess.run([sys.executable, str(ROOT / "launch" / "pretrain.py"), *overrides], cwd=ROOT, check=True)
    losses = [record["loss"] for record in last_records(run / "metrics.jsonl").values() if "loss" in record]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "loss": [round(fmean(losses[i : i + BIN]), 3) for i in range(0, len(losses), BIN)],
        "val_loss": round(summary["val_loss"]["default"], 3),
        "unigram": round(summary["unigram_loss"]["default"], 3),
    }


def draw(results: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    unigram = next(iter(results.values()))["unigram"]
    axes.axhline(unigram, color="black", linewidth=1.2, linestyle=":", label=f"unigram baseline  {unigram:.2f}")
    for method, (name, colour, line) in STYLES.items():
        curve = results[method]["loss"]
        steps = [BIN * (i + 0.5) for i in range(len(curve))]
        label = f"{name}  {results[method]['val_loss']:.2f}"
        axes.plot(steps, curve, color=colour, linestyle=line, linewidth=2.2, label=label)
    axes.set(xlim=(0, STEPS), ylim=(5.7, 7.3), xlabel="optimizer steps", ylabel="training loss, nats per token")
    axes.set_title(f"{LAYERS} layers, same data, optimizer and learning rate: only the method differs", fontsize=12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=11, title="validation loss at the end", loc="upper right")
    figure.savefig(target, dpi=130, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="train the runs in this folder and replace the figures"
    )
    runs = parser.parse_args().runs
    if runs:
        results = {method: train(method, runs) for method in STYLES}
        DATA.write_text(json.dumps(results) + "\n", encoding="utf-8")
    draw(json.loads(DATA.read_text(encoding="utf-8")), PICTURE)


if __name__ == "__main__":
    main()
