"""What is done again is sent once; what a logger is given of a run has no credentials."""

import json
from pathlib import Path
from typing import Any

import pytest

from stablelm.config.load import load
from stablelm.observe.progress import Progress
from stablelm.observe.sinks import Records
from stablelm.observe.sinks.once import Once
from stablelm.observe.sinks.run_info import keep_run_id, run_id, run_info


class Kept:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def rewound(self, step: int) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


def info_of(directory: Path, step: int, *records: dict[str, Any], overrides: tuple[str, ...] = ()):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = load([], [f"run.dir={directory}", *overrides]).config
    return run_info(config, Progress(step=step, attempt=2))


def test_steps_that_are_trained_again_are_left_out(tmp_path: Path):
    earlier = [{"step": step, "loss": float(step), "attempt": 1} for step in (1, 2, 3)]
    kept = Kept()
    once = Once(kept, info_of(tmp_path, 1, *earlier), knows_the_run=True)
    for step in (2, 3, 4):
        once.write({"step": step, "loss": -1.0, "attempt": 2})
    assert kept.records == [{"step": 4, "loss": -1.0, "attempt": 2}]


def test_an_evaluation_that_was_due_is_sent(tmp_path: Path):
    kept = Kept()
    info = info_of(tmp_path, 3, {"step": 3, "loss": 1.0, "attempt": 1})
    Once(kept, info, knows_the_run=True).write({"step": 3, "loss": 1.0, "val_loss/a": 2.0, "attempt": 2})
    assert kept.records == [{"step": 3, "val_loss/a": 2.0, "attempt": 2}]


def test_a_logger_that_does_not_know_the_run_gets_all(tmp_path: Path):
    kept = Kept()
    Once(kept, info_of(tmp_path, 0, {"step": 1, "loss": 1.0}), knows_the_run=False).write({"step": 1, "loss": 2.0})
    assert kept.records == [{"step": 1, "loss": 2.0}]


def test_after_a_rewind_only_new_steps_are_sent(tmp_path: Path):
    kept = Kept()
    once = Once(kept, info_of(tmp_path, 0), knows_the_run=True)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in (1, 2, 3):
            file.write(json.dumps({"step": step, "loss": 9.0}) + "\n")
            once.write({"step": step, "loss": 9.0})
    once.rewound(1)
    for step in (2, 3, 4):
        once.write({"step": step, "loss": 1.0})
    assert [(record["step"], record["loss"]) for record in kept.records] == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0)]


def test_samples_and_names_of_hosts_are_not_sent(tmp_path: Path):
    kept = Kept()
    once = Once(kept, info_of(tmp_path, 0), knows_the_run=True)
    once.write({"step": 1, "tokens": 5, "samples": [{"prompt": "a", "text": "b"}]})
    once.write({"step": 1, "loss": 1.0, "slowest_host": "node7"})
    assert kept.records == [{"step": 1, "loss": 1.0}]


def test_credentials_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SERVICE_TOKEN", "abcdef123456789")
    given = ("data.path=https://host/abcdef123456789/x.txt", "data.storage={s3: {secret: abc}}")
    info = info_of(tmp_path, 0, overrides=given)
    assert info.config["data.path"] == "https://host/***/x.txt"
    assert list(info.config["data.storage"].values()) == ["***"]
    assert "abcdef123456789" not in info.config_text + str(info.config)


def test_a_run_id_with_odd_letters_is_not_believed(tmp_path: Path):
    keep_run_id(tmp_path, "wandb", "a1b2c3")
    assert run_id(tmp_path, "wandb") == "a1b2c3"
    (tmp_path / "wandb" / "run-id").write_text("../../elsewhere\n")
    assert run_id(tmp_path, "wandb") is None


def test_ranks_above_0_write_nothing(tmp_path: Path):
    config = load([], [f"run.dir={tmp_path / 'run'}", "observe.sinks=[tensorboard, wandb]"]).config
    records = Records(config, Progress(), first_rank=False)
    records.write({"step": 1, "loss": 1.0})
    records.rewound()
    records.close()
    assert not (tmp_path / "run").exists()
