"""Real text for tests: present beside a development checkout, absent on a user's machine."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("STABLELM_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


def shared_data(relative: str) -> Path:
    """Path below the shared sample data; skips the test where there is none."""
    path = SHARED_DATA / relative
    if not path.exists():
        pytest.skip(f"sample data {relative} is not beside this checkout")
    return path
