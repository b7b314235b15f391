"""What W&B, MLflow and Trackio hold of a run, each read by its own library: `python -P read_loggers.py RUN_DIR`.

Prints JSON: for each logger a list of points [step, name, value] in the order they were written, and facts of the run.
A program of its own, because Trackio reads its folder from the environment when it is imported.
"""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7


def wandb_records(path: Path) -> Iterator:
    """W&B's own messages, from its file of an offline run: LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def read_wandb(run_dir: Path) -> dict:
    points, rows, runs, text = [], [], [], b""
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        text += path.read_bytes()
        for record in wandb_records(path):
            if record.HasField("run"):
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                runs.append([record.run.run_id, record.run.display_name, list(record.run.tags), config])
            if record.HasField("history"):
                row = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append(row["_step"])
                points += [[row["step"], name, value] for name, value in row.items() if name[0] != "_"]
    return {"points": points, "rows": rows, "runs": runs}


def read_mlflow(run_dir: Path) -> dict:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient((run_dir / "mlflow" / "store").as_uri())
    experiment = client.get_experiment_by_name("stablelm")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    points = [
        [point.step, name, point.value]
        for name in runs[0].data.metrics
        for point in client.get_metric_history(runs[0].info.run_id, name)
    ]
    facts = [[run.info.status, run.info.run_name, run.data.tags, run.data.params] for run in runs]
    return {"points": points, "runs": facts}


def read_trackio(run_dir: Path) -> dict:
    os.environ["TRACKIO_DIR"] = str(run_dir / "trackio")
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("stablelm"))
    points = [
        [row["step"], name, value]
        for row in SQLiteStorage.get_logs("stablelm", runs[0].name)
        for name, value in row.items()
        if name not in ("step", "timestamp")
    ]
    return {"points": points, "runs": [[run.name, run.config] for run in runs]}


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    found = {"wandb": read_wandb(place), "mlflow": read_mlflow(place), "trackio": read_trackio(place)}
    print(json.dumps(found))
