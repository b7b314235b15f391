"""What the probe quotes: the gradient of each model of a trainability comparison at its start, and whether it trained.

    python benchmarks/trained.py trainability/trainability.json [--out stablelm/probe/trainability.json]

A model trained if at its best learning rate the mean validation loss lies LEARNED nats below that of a unigram model,
which is what counting tokens reaches without any layer. The report's data and tokenizer are read again.
"""

import argparse
import json
import tempfile
from pathlib import Path

from stablelm.config.load import load
from stablelm.probe.measure import measure
from stablelm.probe.prober import prepare
from stablelm.probe.verdict import TRAINABILITY
from stablelm.train.job import first_rows

LEARNED = 0.1
SEQUENCES = 8


def gradient_ratio(method: str, settings: dict) -> float:
    """Norm of the loss's gradient to the stream after layer 1 over that after the last, seed 0, on the run's text."""
    loaded = load([], [f"{name}={json.dumps(value)}" for name, value in {**settings, "model.method": method}.items()])
    request = prepare(loaded, None, SEQUENCES, None)
    tokens, targets = first_rows(request.prepared, SEQUENCES, request.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        norms = measure(
            request.config.model,
            tokens,
            targets,
            precision="fp32",
            seed=0,
            pieces=request.prepared.tokenizer.pieces,
            folder=Path(folder),
        ).internals.gradient_norm
    return float(norms[1] / norms[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, help="trainability.json of benchmarks/trainability.py")
    parser.add_argument("--out", type=Path, default=TRAINABILITY)
    arguments = parser.parse_args()
    told = json.loads(arguments.report.read_text())
    unigram = told["runs"][0]["unigram_loss"]
    found = []
    for row in told["methods"]:
        ratio = float(f"{gradient_ratio(row['method'], told['settings']):.4g}")
        trained = row["val_loss_mean"] < unigram - LEARNED
        found.append({"method": row["method"], "gradient_ratio": ratio, "trained": trained})
        print(f"{row['method']}: {ratio:.4g}, {'trained' if trained else 'did not train'}", flush=True)
    lines = ",\n".join(f" {json.dumps(item)}" for item in found)
    arguments.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
