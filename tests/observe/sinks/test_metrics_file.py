"""metrics.jsonl."""

import errno
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablelm.errors import StorageError
from stablelm.new_files import open_to_append
from stablelm.observe.sinks import MetricsFile, last_records, metrics_file, read_metrics


def write(path, *records):
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()


def test_a_record_is_there_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "loss": 0.1 + 0.2})
    assert json.loads(path.read_text()) == {"step": 1, "loss": 0.1 + 0.2}
    file.close()


def test_opening_again_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 1})
    write(path, {"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@settings(deadline=None)
@given(st.integers(0, 60))
def test_a_torn_last_line_is_dropped(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    write(path, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - cut])
    lines = whole[: len(whole) - cut].count(b"\n")
    assert [r["step"] for r in read_metrics(path)] == [1, 2][:lines]
    write(path, {"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [*[1, 2][:lines], 3]


def test_a_torn_line_longer_than_a_read(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "' + b"x" * 200_000)
    write(path, {"step": 3})
    assert [r["step"] for r in read_metrics(path)] == [1, 3]


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 1, "loss": math.nan, "a": math.inf, "b": -math.inf, "name": "x"})
    assert json.loads(path.read_text()) == {"step": 1, "loss": "nan", "a": "inf", "b": "-inf", "name": "x"}
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert (record["a"], record["b"], record["name"]) == (math.inf, -math.inf, "x")


@settings(deadline=None)
@given(st.floats(allow_nan=False))
def test_floats_keep_every_bit(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("bits") / "m.jsonl"
    write(path, {"step": 1, "loss": value})
    assert read_metrics(path)[0]["loss"] == value


def test_the_last_record_of_a_step_counts(tmp_path):
    path = tmp_path / "m.jsonl"
    write(
        path,
        {"step": 10, "loss": 3.0, "attempt": 1},
        {"step": 20, "loss": 2.0, "attempt": 1},
        {"step": 20, "val_loss/default": 2.5, "attempt": 1},
        {"step": 10, "loss": 3.5, "attempt": 2},
        {"step": 20, "loss": 2.1, "attempt": 2},
    )
    assert last_records(path) == {
        10: {"step": 10, "loss": 3.5, "attempt": 2},
        20: {"step": 20, "loss": 2.1, "attempt": 2},
    }


def test_an_evaluation_that_a_later_attempt_made_adds_to_its_step(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, {"step": 20, "loss": 2.0, "attempt": 1}, {"step": 20, "val_loss/x": 2.5, "attempt": 2})
    assert last_records(path) == {20: {"step": 20, "loss": 2.0, "val_loss/x": 2.5, "attempt": 2}}


def test_training_and_validation_of_a_step_add_up(tmp_path):
    path = tmp_path / "m.jsonl"
    write(
        path,
        {"step": 20, "loss": 2.0, "attempt": 1},
        {"step": 20, "val_loss/x": 2.5, "attempt": 1},
        {"step": 20, "loss": 1.9, "attempt": 1},
    )
    assert last_records(path) == {20: {"step": 20, "loss": 1.9, "val_loss/x": 2.5, "attempt": 1}}


class Disk:
    """A file that is opened to append to, whose writes go to `write` with the file itself."""

    def __init__(self, path, write):
        self.inner = open_to_append(path)
        self.write = lambda data: write(self.inner, data)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_full_disk_is_a_storage_error(tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics_file, "open_to_append", lambda path: Disk(path, full))
    file = MetricsFile(tmp_path / "m.jsonl")
    with pytest.raises(StorageError, match=r"m\.jsonl cannot be written \(No space left on device\); free some space"):
        file.write({"step": 1})
    file.close()


def test_a_disk_that_takes_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(
        metrics_file, "open_to_append", lambda path: Disk(path, lambda file, data: file.write(data[:3]))
    )
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write({"step": 1, "loss": 2.0})
    file.close()
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"make it writable, or name another run\.dir") as caught:
        MetricsFile(tmp_path / "file" / "m.jsonl")
    assert caught.value.exit_code == 74


def test_a_read_only_file_system(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(metrics_file, "open", refuse, raising=False)
    with pytest.raises(StorageError, match="Read-only file system"):
        MetricsFile(tmp_path / "m.jsonl")
