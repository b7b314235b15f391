"""What the probe quotes: the gradient of each model of a trainability comparison at its start, and whether it trained.

    python benchmarks/trained.py trainability/trainability.json ... [--out stablelm/probe/trainability.json]

A model trained if at its best learning rate the mean validation loss lies LEARNED nats below that of a unigram model,
which is what counting tokens reaches without any layer; with several reports, of other warm-ups and lengths, if it did
in any. The reports' data and tokenizer are read again.
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
    parser.add_argument("report", type=Path, nargs="+", help="trainability.json of benchmarks/trainability.py")
    parser.add_argument("--out", type=Path, default=TRAINABILITY)
    arguments = parser.parse_args()
    trained, settings = {}, {}
    for report in arguments.report:
        told = json.loads(report.read_text())
        unigram = told["runs"][0]["unigram_loss"]
        for row in told["methods"]:
            learned = row["val_loss_mean"] < unigram - LEARNED
            trained[row["method"]] = trained.get(row["method"], False) or learned
            settings.setdefault(row["method"], told["settings"])
    found = []
    for method, learned in trained.items():
        ratio = float(f"{gradient_ratio(method, settings[method]):.4g}")
        found.append({"method": method, "gradient_ratio": ratio, "trained": learned})
        print(f"{method}: {ratio:.4g}, {'trained' if learned else 'did not train'}", flush=True)
    lines = ",\n".join(f" {json.dumps(item)}" for item in found)
    arguments.out.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
