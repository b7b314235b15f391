"""Tests of what only a GPU can show. `make test-gpu` runs them there and writes a report; elsewhere they skip.

Each test that takes `device` also runs on the CPU at a tiny size where there is no GPU, so that its own code is tested.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from gpu_report import GpuReport

FOLDER = os.environ.get("GPU_REPORT")
REPORT = GpuReport()


@pytest.fixture(params=["cuda", "cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    found = torch.cuda.is_available()
    if request.param == "cuda" and not found:
        pytest.skip("torch sees no GPU; run make test-gpu on a machine with one")
    if request.param == "cpu" and found:
        pytest.skip("the GPU does it here")
    yield torch.device(request.param, 0) if found else torch.device("cpu")
    if found:
        torch.cuda.empty_cache()


@pytest.fixture
def report() -> GpuReport:
    """Figures for the report of the session."""
    return REPORT


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.skipped or report.failed:
        REPORT.finished(report)


def pytest_sessionfinish() -> None:
    if FOLDER:
        REPORT.write(Path(FOLDER))
