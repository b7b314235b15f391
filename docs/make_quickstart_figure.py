"""Draws docs/quickstart.png, the curve in the README, from the records of `make quickstart`."""

import json
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))


def main(run_dir: Path, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from stablelm.observe.sinks import last_records

    records = last_records(run_dir / "metrics.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    train = [(r["tokens"], r["loss"]) for r in records.values() if "loss" in r]
    validation = [(r["tokens"], r["val_loss/default"]) for r in records.values() if "val_loss/default" in r]
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    axes.plot(*zip(*train, strict=True), color="0.65", label="training")
    axes.plot(*zip(*validation, strict=True), "o-", color="tab:blue", label="validation")
    unigram = summary["unigram_loss"]["default"]
    axes.axhline(unigram, color="tab:red", linestyle=":", label=f"unigram baseline, {unigram:.2f}")
    axes.set(xlabel="tokens", ylabel="loss, nats per token", title="make quickstart: 24 layers x 128 on a CPU")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(
        Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "runs" / "quickstart"),
        REPOSITORY / "docs" / "quickstart.png",
    )
