"""Samples at each evaluation: written on every engine, equal on all, and training does not notice them."""

import json
import signal
import time
from pathlib import Path

import pytest
from end_to_end.test_stops import ENDLESS, start, wait_for_steps
from support.programs import TINY, run, summary
from support.tiny import TinyCorpus

from stablelm.observe.sinks import SAMPLES, last_records
from stablelm.printable import printable

PROMPTS = ["bato", "de fin hu"]
SAMPLED = ('evaluate.samples=["bato", "de fin hu"]', "evaluate.sample_tokens=12")
OPTIONS = ("train.steps=4", "train.lr=1e-2", "train.warmup_steps=0", "evaluate.every=2", "model.dropout=0.1")


def trained(folder: Path, corpus: TinyCorpus, *options: str, processes: int = 1, code: int = 0) -> dict[int, dict]:
    """The records of a run, by step; the samples of the last one are on the terminal too."""
    line = (*TINY, *corpus.overrides(), *OPTIONS, f"run.dir={folder}", *options)
    done = run("pretrain", *line, processes=processes)
    assert done.returncode == code, done.stderr
    records = last_records(folder / "metrics.jsonl")
    texts = [sample["prompt"] + sample["text"] for sample in records.get(4, {}).get(SAMPLES, [])]
    said = [line.removeprefix("sample:   ") for line in done.stdout.splitlines() if line.startswith("sample: ")]
    assert said == [printable(" ".join(text.split())) for text in texts]
    assert code or f"generate: python launch/generate.py --checkpoint {folder} --prompt TEXT" in done.stdout
    return records


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("checkpoints/step-00000004/tensors/*.safetensors"))]


@pytest.mark.parametrize(
    ("kind", "processes", "options"),
    [
        ("single", 1, ["model.method=catformer_sigma"]),
        ("single", 1, ["engine.recompute=full"]),
        pytest.param("single", 1, ["train.compile=true", "model.n_layers=1"], marks=pytest.mark.slow),
        pytest.param("ddp", 2, [], marks=pytest.mark.slow),
        ("fsdp2", 2, ["engine.unit_bytes=1", "model.tie_embeddings=true"]),
        pytest.param("fsdp2", 2, ["train.precision=bf16"], marks=pytest.mark.slow),
        pytest.param("zero1", 2, [], marks=pytest.mark.slow),
        pytest.param("zero3", 2, [], marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_bit_for_bit(
    kind: str, processes: int, options: list[str], tiny_corpus: TinyCorpus, tmp_path: Path
):
    options = [f"engine.kind={kind}", *options]
    plain = trained(tmp_path / "plain", tiny_corpus, *options, processes=processes)
    sampled = trained(tmp_path / "sampled", tiny_corpus, *options, *SAMPLED, processes=processes)
    for step, record in plain.items():
        assert [sampled[step].get(name) for name in ("loss", "val_loss/default")] == [
            record.get(name) for name in ("loss", "val_loss/default")
        ]
    assert weights(tmp_path / "sampled") == weights(tmp_path / "plain") != []
    assert [step for step, record in sampled.items() if SAMPLES in record] == [2, 4]
    for step in (2, 4):
        assert [sample["prompt"] for sample in sampled[step][SAMPLES]] == PROMPTS
        assert all(isinstance(sample["text"], str) for sample in sampled[step][SAMPLES])


@pytest.mark.slow
def test_engines_write_the_same_texts_and_so_does_the_program(tiny_corpus: TinyCorpus, tmp_path: Path):
    found = {}
    for kind, processes in (("single", 1), ("fsdp2", 2), ("zero3", 2)):
        options = (f"engine.kind={kind}", "model.dropout=0", *SAMPLED)
        records = trained(tmp_path / kind, tiny_corpus, *options, processes=processes)
        found[kind] = [sample["text"] for sample in records[4][SAMPLES]]
    assert found["single"] == found["fsdp2"] == found["zero3"]
    assert any(found["single"])
    asked = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    out = tmp_path / "texts.jsonl"
    line = ["--checkpoint", str(tmp_path / "zero3"), "--max-new-tokens", "12", "--temperature", "0", "--out", str(out)]
    done = run("generate", *line, *asked)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == found["single"]


def test_tensorboard_has_the_texts(tiny_corpus: TinyCorpus, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = trained(tmp_path, tiny_corpus, *SAMPLED)
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name), size_guidance={"tensors": 0})
    events.Reload()
    for number, prompt in enumerate(PROMPTS, 1):
        shown = events.Tensors(f"samples/{number}/text_summary")
        assert [event.step for event in shown] == [2, 4]
        text = shown[-1].tensor_proto.string_val[0].decode()
        assert text == "    " + prompt + records[4][SAMPLES][number - 1]["text"]


def test_prompts_are_checked_before_anything_is_created(tiny_corpus: TinyCorpus, tmp_path: Path):
    line = (*TINY, *tiny_corpus.overrides(), f"run.dir={tmp_path / 'run'}", "model.attention.position=learned")
    done = run("pretrain", *line, 'evaluate.samples=["bato", ""]', "evaluate.sample_tokens=32")
    assert done.returncode == 78
    assert "evaluate.samples: prompt 2 is empty; give it at least a word" in done.stderr
    assert "with evaluate.sample_tokens=32 more than the 32 positions" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_price_is_no_variable(tiny_corpus: TinyCorpus, tmp_path: Path):
    records = trained(tmp_path, tiny_corpus, 'evaluate.samples=["it costs $HOME"]', "evaluate.sample_tokens=2")
    assert records[4][SAMPLES][0]["prompt"] == "it costs $HOME"
    assert summary(tmp_path)["exit_code"] == 0


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_between_two_tokens_stops_the_run_which_writes_them_later(
    processes: int, tiny_corpus: TinyCorpus, tmp_path: Path
):
    long = (*SAMPLED[:1], "evaluate.sample_tokens=100000", "evaluate.every=2", "evaluate.batches=1")
    process = start(tiny_corpus, tmp_path, *long, processes=processes)
    wait_for_steps(tmp_path, 2, process)
    time.sleep(1)  # the validation set takes less
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    told = summary(tmp_path)
    assert (told["exit_code"], told["reason"], told["step"]) == (75, "signal", 2)
    assert not {SAMPLES, "val_loss/default"} & set(last_records(tmp_path / "metrics.jsonl")[2])
    line = (*TINY, *tiny_corpus.overrides(), *ENDLESS, *long, f"run.dir={tmp_path}")
    again = run("pretrain", *line, "evaluate.sample_tokens=3", "run.stop_after=3", processes=processes)
    assert summary(tmp_path)["exit_code"] == 75, again.stderr
    assert {SAMPLES, "val_loss/default"} <= set(last_records(tmp_path / "metrics.jsonl")[2])
