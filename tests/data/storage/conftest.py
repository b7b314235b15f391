"""A file of text in each kind of store, which may misbehave, read with short waits between attempts."""

import pytest
from support.faulty_stores import STORES, stored

from stablelm.data.storage import retry


@pytest.fixture
def quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(retry, "LONGEST_DELAY", 0.1)


@pytest.fixture(params=STORES)
def store(request, tmp_path, monkeypatch, quick_retries):
    yield from stored(request.param, tmp_path, monkeypatch)
