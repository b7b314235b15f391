"""Reading metrics.jsonl for a page: in one pass, from where it ended, and whatever is in it."""

import json
import math
import os

import numpy as np
import pytest

from stablelm.observe.page import metrics_reader
from stablelm.observe.page.metrics_reader import MetricsReader
from stablelm.observe.sinks import MetricsFile, last_records


def read(path):
    reader = MetricsReader(path)
    reader.update()
    return reader


def write(path, *records):
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()


def training(step, attempt=1, loss=None, **more):
    return {"step": step, "tokens": 10 * step, "loss": 9.0 - step if loss is None else loss, "attempt": attempt, **more}


def values(reader, name):
    return {point.first: point.mean for point in reader.curves[name].points}


def history(seed):
    """Records of attempts that resume at random steps and evaluate at every third step."""
    drawn, step, records = np.random.default_rng(seed), 0, []
    for attempt in range(1, 5):
        for step in range(step + 1, step + int(drawn.integers(2, 9))):  # noqa: B020 - goes on from where it was
            records.append(training(step, attempt, loss=float(drawn.normal())))
            if step % 3 == 0:
                records.append({"step": step, "val_loss/a": float(drawn.normal()), "attempt": attempt})
        step = int(drawn.integers(0, step + 1))
    return records


@pytest.mark.parametrize("seed", range(8))
def test_it_keeps_what_counts_of_each_step(tmp_path, seed):
    path = tmp_path / "metrics.jsonl"
    write(path, *history(seed))
    counts = last_records(path)
    reader = read(path)
    last = reader.step  # of the last attempt; what an earlier one made beyond it is not part of the run
    for name in ("loss", "val_loss/a"):
        expected = {step: r[name] for step, r in counts.items() if name in r and step <= last}
        assert values(reader, name) == expected


def test_it_goes_on_from_where_it_ended(tmp_path):
    path, records = tmp_path / "metrics.jsonl", history(3)
    reader = MetricsReader(path)
    for record in records:
        write(path, record)
        assert reader.unread_bytes() > 0
        reader.update()
        assert reader.unread_bytes() == 0
    whole = read(path)
    assert (reader.curves, reader.events, reader.step) == (whole.curves, whole.events, whole.step)


def test_another_file_is_read_from_the_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(training(step) for step in range(1, 6)))
    reader = read(path)
    other = tmp_path / "other"
    write(other, *(training(step, loss=1.0) for step in range(1, 9)))
    os.replace(other, path)
    reader.update()
    assert set(values(reader, "loss").values()) == {1.0} and reader.step == 8


def test_a_line_that_is_being_written_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps(training(2)) + "\n"
    path.write_text(json.dumps(training(1)) + "\n" + line[:20])
    reader = read(path)
    assert (reader.step, reader.damaged_count) == (1, 0)
    with open(path, "a") as file:
        file.write(line[20:])
    reader.update()
    assert (reader.step, reader.damaged_count) == (2, 0)


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\xfe\x00", b"[1]", b"null", b'{"step": -1}', b'{"step": 1.5}', b'{"step": true}', b'{"loss": 1}',
     b'{"step": 99999999999999999999}', b"[" * 5000, b'{"step": 3, "loss": NaN}', b"{" + b" " * 3_000_000],
)  # fmt: skip
def test_a_line_that_is_no_record_is_counted_and_passed_over(tmp_path, garbage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        json.dumps(training(1)).encode() + b"\n" + garbage + b"\n" + json.dumps(training(2)).encode() + b"\n"
    )
    reader = read(path)
    assert (reader.step, reader.damaged_count, reader.damaged) == (2, 1, [2])


def test_a_line_beyond_all_records_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_reader, "LONGEST_LINE", 1000)
    path = tmp_path / "metrics.jsonl"
    long = json.dumps({"step": 2, "text": "x" * 5000})
    path.write_text(f"{json.dumps(training(1))}\n{long}\n{json.dumps(training(3))}\n")
    reader = read(path)
    assert (reader.step, reader.damaged) == (3, [2])


def test_values_of_other_kinds_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd = {"a": None, "b": True, "c": "host", "d": [1], "e": {"f": 1}, "g": "nan", "h": 2**64 - 1}
    path.write_text(json.dumps(training(1) | odd) + "\n")
    reader = read(path)
    assert set(reader.curves) == {"loss", "g", "h"}
    assert math.isnan(reader.curves["g"].latest) and reader.curves["g"].not_finite == [1]


def test_names_without_end_take_no_memory_without_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    names = {f"name{number}": 1.0 for number in range(2000)} | {f"layer/0001/n{number}": 1.0 for number in range(500)}
    path.write_text(json.dumps({"step": 1} | names | {"layer/99999/x": 1.0}) + "\n")
    reader = read(path)
    assert len(reader.curves) == metrics_reader.MOST_CURVES and len(reader.maps) == metrics_reader.MOST_MAPS
    assert reader.omitted_metrics > 0


def test_maps_of_layers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        {"step": 5, "layer/0000/grad_norm": 1.0, "layer/0001/grad_norm": 2.0, "attention/0001/entropy": 3.0},
        {"step": 10, "layer/0001/grad_norm": math.nan, "sigma/0002/query": 4.0, "layer/0000/grad_norm": 5.0},
    )  # fmt: skip
    maps = read(path).maps
    np.testing.assert_array_equal(maps["layer/grad_norm"].means(), [[1, 5], [2, np.nan]])
    np.testing.assert_array_equal(maps["attention/entropy"].means(), [[3]])
    np.testing.assert_array_equal(maps["sigma/query"].means(), [[np.nan], [4]])


def test_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path,
        training(1, skipped_steps=0, spikes=0, rewinds=0),
        training(2, skipped_steps=2, spikes=0, rewinds=0),
        training(3, skipped_steps=3, spikes=1, rewinds=0),
        training(2, skipped_steps=3, spikes=1, rewinds=1),
        training(3, loss=math.nan, skipped_steps=3, spikes=1, rewinds=1),
        training(3, attempt=2),
        {"step": 3, "attempt": 2, "changes": {"train.lr": [0.004, 0.001], "bad": 1}},
    )
    assert [(event.kind, event.first, event.last, event.count, event.reached) for event in read(path).events] == [
        ("attempt", 0, 0, 1, 0),
        ("skipped", 2, 3, 3, 0),
        ("spike", 3, 3, 1, 0),
        ("rewind", 2, 2, 1, 3),
        ("not_finite", 3, 3, 1, 0),
        ("attempt", 3, 3, 2, 3),
        ("changed", 3, 3, 2, 0),
    ]
    assert read(path).events[-1].what == "train.lr 0.004 → 0.001"


def test_time_in_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *(training(step, step_seconds=0.5) for step in (10, 20, 30)), training(20, attempt=2, step_seconds=1.0))
    assert read(path).seconds == 30 * 0.5 + 10 * 1.0


def test_samples_of_the_first_and_the_last_evaluation(tmp_path):
    path = tmp_path / "metrics.jsonl"
    texts = [[{"prompt": "a", "text": str(step)}] for step in range(4)]
    write(path, *({"step": step + 1, "samples": text} for step, text in enumerate(texts)))
    path.open("a").write('{"step": 4, "samples": [{"prompt": 1, "text": "x"}, "y", {"prompt": "a", "text": "3"}]}\n')
    assert read(path).samples == {1: texts[0], 4: texts[3]}
