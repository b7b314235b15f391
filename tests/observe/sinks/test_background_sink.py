"""A logger in its own thread neither slows training down nor ends it."""

import threading
import time
from typing import Any

import pytest

from stablelm.observe.sinks import background
from stablelm.observe.sinks.background import Background


class Kept:
    """Keeps what it is given; `fails_at`: the step at which it raises; `gate`: what it waits for."""

    def __init__(self, fails_at: int = 0, gate: threading.Event | None = None):
        self.steps: list[int] = []
        self.calls: list[Any] = []
        self.fails_at, self.gate = fails_at, gate

    def write(self, record: dict[str, Any]) -> None:
        if self.gate is not None:
            self.gate.wait(20)
        if record["step"] == self.fails_at:
            raise OSError("No space left on device\nsecond line")
        self.steps.append(record["step"])

    def rewound(self, step: int) -> None:
        self.calls.append(("rewound", step))

    def close(self, failed: bool) -> None:
        self.calls.append(("closed", failed))


def test_everything_arrives_in_order():
    kept, said = Kept(), []
    logger = Background("wandb", lambda: kept, said.append)
    for step in range(1, 6):
        logger.write({"step": step})
    logger.rewound(2)
    logger.close(False)
    assert (kept.steps, kept.calls, said) == ([1, 2, 3, 4, 5], [("rewound", 2), ("closed", False)], [])


def test_a_failure_is_one_warning():
    kept, said = Kept(fails_at=2), []
    logger = Background("mlflow", lambda: kept, said.append)
    for step in range(1, 6):
        logger.write({"step": step})
    logger.close(False)
    assert kept.steps == [1]
    assert said == [
        "warning: observe.sinks: mlflow takes no more records of this attempt (OSError: No space left on device); "
        "training continues, and metrics.jsonl has them all"
    ]


def test_one_that_does_not_open_is_a_warning():
    def make():
        raise ConnectionError("no route to host")

    said: list[str] = []
    logger = Background("trackio", make, said.append)
    logger.write({"step": 1})
    logger.close(False)
    assert len(said) == 1 and "trackio" in said[0] and "no route to host" in said[0]


def test_one_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "QUEUED", 3)
    monkeypatch.setattr(background, "FAILED_SECONDS", 0.2)
    gate, said = threading.Event(), []
    logger = Background("wandb", lambda: Kept(gate=gate), said.append)
    began = time.monotonic()
    for step in range(20):
        logger.write({"step": step})
    logger.close(True)
    assert time.monotonic() - began < 5
    assert len(said) == 2 and "3 records behind" in said[0] and "after 0 s at the end" in said[1]
    gate.set()
