"""TensorBoard: groups that begin with the loss, layers as images, texts, and what is done again."""

from pathlib import Path

import pytest

from stablelm.errors import StorageError
from stablelm.observe.sinks.tensorboard_sink import TensorBoardSink, tag


def events(directory: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    found = events(directory)
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def layers(step: int, depth: int = 3) -> dict:
    names = ("layer/{:04d}/stream_rms", "layer/{:04d}/grad_norm", "sigma/{:04d}/query")
    return {"step": step} | {name.format(i): 1.0 + i * step for name in names for i in range(1, depth + 1)}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """File names hold the second they were made in, and TensorBoard reads them in the order of names."""
    import tensorboard.summary.writer.event_file_writer as writer

    ticks = iter(range(1_800_000_000, 1_900_000_000))
    monkeypatch.setattr(writer.time, "time", lambda: next(ticks))


def test_a_scalar_for_each_metric_in_the_folder_of_the_runs_name(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, "deep")
    sink.write(
        {"step": 1, "tokens": 100, "attempt": 1, "loss": 2.5, "val_loss/default": 2.25, "note": "x", "own/f1": 3}
    )
    sink.close()
    assert scalars(tmp_path / "deep") == {
        "1_loss/loss": [(1, 2.5)],
        "1_loss/val_loss/default": [(1, 2.25)],
        "own/f1": [(1, 3)],
    }


def test_the_loss_comes_first():
    names = [
        "attention/entropy",
        "val_loss/a",
        "lr",
        "tokens_per_second",
        "memory_bytes",
        "loss",
        "data_epoch/web",
        "own",
    ]
    assert min(map(tag, names)) == tag("loss")


def test_layers_are_images_and_no_scalars(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, "deep")
    for step in (10, 20):
        sink.write({**layers(step), "embedding/tev_mean": 0.5})
    sink.close()
    found = events(tmp_path / "deep").Tags()
    assert set(found["images"]) == {"7_layers/layer/stream_rms", "7_layers/layer/grad_norm", "7_layers/sigma/query"}
    assert found["scalars"] == ["7_layers/embedding/tev_mean"]


def test_the_images_of_a_long_run_are_few(tmp_path: Path):
    sink = TensorBoardSink(tmp_path, "deep")
    for step in range(1, 101):
        sink.write({"step": step, "layer/0000/stream_rms": 1.0, "layer/0001/stream_rms": 2.0})
    sink.close()
    steps = [image.step for image in events(tmp_path / "deep").Images("7_layers/layer/stream_rms")]
    assert steps[0] == 1 and steps[-1] == 100
    assert len(steps) < 20


def test_what_is_done_again_is_forgotten(tmp_path: Path, later: None):
    first = TensorBoardSink(tmp_path, "deep")
    for step in (1, 2, 3):
        first.write({"step": step, "loss": float(step)} | layers(step))
    first.close()
    second = TensorBoardSink(tmp_path, "deep", purge_step=3, history=[layers(1), layers(2)])
    second.write({"step": 3, "loss": 30.0} | layers(3))
    second.rewound(1)
    second.write({"step": 2, "loss": 20.0} | layers(2))
    second.close()
    assert scalars(tmp_path / "deep")["1_loss/loss"] == [(1, 1.0), (2, 20.0)]


def test_a_run_that_was_renamed_or_is_older_goes_on_where_its_events_are(tmp_path: Path, later: None):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "old"))
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    sink = TensorBoardSink(tmp_path, "new", purge_step=2)
    sink.write({"step": 2, "loss": 2.0})
    sink.close()
    assert scalars(tmp_path / "old") == {"loss": [(1, 1.0)], "1_loss/loss": [(2, 2.0)]}
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        TensorBoardSink(tmp_path / "file" / "tb", "deep")
