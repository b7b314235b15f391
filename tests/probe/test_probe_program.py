"""The program: its files, its words, its errors."""

import json
import math
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support.programs import run as run_program
from support.tiny import TinyCorpus

from stablelm.config.load import load
from stablelm.probe.measure import measure
from stablelm.probe.predict import Prediction, predict
from stablelm.probe.probe_report import chosen
from stablelm.probe.prober import collision_of, prepare, probe, reference_model
from stablelm.probe.verdict import KINDS
from stablelm.train.job import first_rows

SHAPE = ["model.n_layers=3", "model.d_model=32", "model.n_heads=4", "train.steps=5", "data.seq_len=24", "data.lanes=12"]


def probed(corpus: TinyCorpus, out: Path, *overrides: str, sequences: int = 2, seq_len: int | None = None) -> int:
    return probe([], [*SHAPE, *corpus.overrides(), *overrides], out=str(out), sequences=sequences, seq_len=seq_len)


def read(out: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((out / "probe.json").read_text(), parse_constant=refuse)


def test_files_table_and_verdict(tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "deep" / "probe"
    overrides = ["model.method=magneto_sigma", "train.precision=bf16"]
    assert probed(tiny_corpus, out, *overrides) == 0
    told, found = capsys.readouterr().out, read(out)
    assert (found["method"], found["n_layers"], found["d_model"]) == ("magneto_sigma", 3, 32)
    assert (found["seq_len"], found["tokens"]) == (24, 48)
    assert 0.5 < found["loss"] / math.log(300) < 2
    assert 0 < found["tev"]["std"] < found["tev"]["mean"]
    assert 0 < found["sigma"]["smallest"] < found["sigma"]["largest"]
    assert len(found["layers"]) == 4
    for layer in found["layers"]:
        for name in ("stream_variance", "branch_variance", "token_correlation", "attention_entropy", "gradient_norm"):
            assert set(layer[name]) == {"predicted", "measured"}
        assert all(isinstance(figure["measured"], float) for figure in layer.values())
        assert layer["weight_gradient_norm"]["predicted"] is None
        assert layer["stream_variance"]["predicted"] > 0
    assert found["layers"][0]["attention_entropy"] == {"predicted": None, "measured": 0.0}
    assert found["layers"][0]["branch_variance"]["measured"] == found["layers"][0]["stream_variance"]["measured"]
    assert found["layers"][3]["gradient_norm"]["predicted"] > 0
    assert (out / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["probe.json", "probe.png"]
    assert "fp32 in place of bf16" in told
    assert found["verdict"] in " ".join(told.split())
    assert "deepscalelm_pre at this shape" in found["verdict"]
    assert [each["signal"] for each in found["evidence"]] == [kind.name for kind in KINDS]
    assert {each["status"] for each in found["evidence"]} <= {"for", "against", "none"}
    sensitivity = found["sensitivity"]
    assert 0.3 < sensitivity["measured"] / sensitivity["predicted"] < 3 and sensitivity["reason"] is None
    assert found["unpredicted"] == {}
    assert set(found["first_steps"]) == {"output_change", "stream_variance", "token_correlation", "loss"}
    assert found["layers"][2]["attention_sink"]["predicted"] is None
    assert 0 < found["layers"][2]["attention_sink"]["measured"] < 1
    assert probed(tiny_corpus, out, *overrides) == 0  # the folder is used again
    assert {k: v for k, v in read(out).items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}


def test_the_figures_are_those_of_the_run(tiny_corpus: TinyCorpus, tmp_path: Path):
    """Of its text, its seed and its precision."""
    assert probed(tiny_corpus, tmp_path, "run.seed=5", "train.precision=fp64", sequences=3, seq_len=16) == 0
    given = [*SHAPE, *tiny_corpus.overrides(), "run.seed=5", "train.precision=fp64"]
    request = prepare(load([], given), None, 3, 16)
    tokens, targets = first_rows(request.prepared, 3, 16)
    model, pieces = request.config.model, request.prepared.tokenizer.pieces
    expected = measure(model, tokens, targets, precision="fp64", seed=5, pieces=pieces, folder=tmp_path)
    found = read(tmp_path)
    assert found["loss"] == expected.loss
    assert [layer["gradient_norm"]["measured"] for layer in found["layers"]] == list(expected.internals.gradient_norm)
    same = [a == b for row in tokens.tolist() for i, a in enumerate(row) for j, b in enumerate(row) if i != j]
    assert found["token_collision"] == pytest.approx(np.mean(same)) == collision_of(tokens)


def test_an_exploding_model_is_reported(tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    overrides = ["model.placement=none", "model.init=fan_in", "model.activation=swiglu", "model.n_layers=12"]
    assert probed(tiny_corpus, tmp_path, *overrides) == 0
    found = read(tmp_path)
    assert found["layers"][12]["stream_variance"] == {"predicted": None, "measured": "nan"}
    assert found["verdict"].startswith("The stream is not finite in fp32 from layer ")
    assert found["unpredicted"]["stream_variance"] == "figures of the theory are too large for float64"
    assert "too large for float64." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "everything", "words"),
    [
        (["model.method=looped"], True, "shared layers have the same ones at several"),
        (["model.method=clipped_softmax"], True, "depends on the largest logits of each row"),
        (["model.method=post_ln", "model.n_layers=24"], False, "tokens have collapsed"),
    ],
)
def test_what_is_not_predicted_has_a_reason(
    tiny_corpus: TinyCorpus, tmp_path: Path, capsys, overrides: list[str], everything: bool, words: str
):
    assert probed(tiny_corpus, tmp_path, *overrides, sequences=1) == 0
    told, found = " ".join(capsys.readouterr().out.split()), read(tmp_path)
    assert len(found["unpredicted"]) == (len(fields(Prediction)) if everything else 1)
    (reason,) = set(found["unpredicted"].values())
    assert words in reason
    assert f"No prediction of {'all figures' if everything else 'gradient norm'}: {reason}." in told
    assert found["layers"][-1]["gradient_norm"]["predicted"] is None
    assert (found["layers"][-1]["stream_variance"]["predicted"] is None) == everything
    if everything:
        assert found["sensitivity"]["reason"] == reason


def test_a_theory_beyond_floats_predicts_up_to_there(tiny_corpus: TinyCorpus):
    overrides = ("model.placement=none", "model.init=fan_in", "model.activation=swiglu", "model.n_layers=16")
    config = prepare(load([], [*SHAPE, *tiny_corpus.overrides(), *overrides]), None, 1, None).config
    finite = np.isfinite(predict(config.model, seq_len=24, tokens=24, collision=0.1).stream_variance)
    assert finite[0] and not finite[-1]
    assert finite.tolist() == sorted(finite.tolist(), reverse=True)


def test_the_model_beside_has_the_shape_and_its_own_axes(tiny_corpus: TinyCorpus):
    loaded = load([], [*SHAPE, *tiny_corpus.overrides(), "model.method=catformer", "model.kv_heads=2"])
    request = prepare(loaded, None, 1, None)
    found = reference_model(request.config, request.prepared.tokenizer.pieces)
    assert found is not None
    assert (found.method, found.stream, found.init) == ("deepscalelm_pre", "scaled", "deepscale")
    assert (found.n_layers, found.d_model, found.kv_heads, found.d_ff) == (3, 32, 2, 128)
    assert found.vocab_size == request.config.model.vocab_size


def test_a_shorter_text_than_training_needs_will_do(tiny_corpus: TinyCorpus, tmp_path: Path):
    assert probed(tiny_corpus, tmp_path, "train.global_batch_size=4096", "data.lanes=4096") == 0


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["model.method=magnetto"], {}, "did you mean magneto?"),
        (["data.path=nowhere/*.json"], {}, "data.path"),
        ([], {"seq_len": 25}, "--seq-len 25 is longer than model.max_seq_len=24; ask for at most 24"),
        ([], {"seq_len": 1}, "--seq-len 1"),
        ([], {"sequences": 0}, "--sequences 0 must be at least 1"),
    ],
)
def test_bad_input(tiny_corpus: TinyCorpus, tmp_path: Path, capsys, overrides: list[str], options: dict, words: str):
    out = tmp_path / "out"
    assert probed(tiny_corpus, out, *overrides, **options) == 78
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_folder_that_is_none(tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "file"
    file.write_text("mine")
    assert probed(tiny_corpus, file) == 78
    assert probed(tiny_corpus, file / "below") == 74
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == f"error: --out {file} is a file; name a directory"
    assert "another folder by --out" in errors[1]
    assert file.read_text() == "mine"


def test_a_shape_that_the_model_beside_cannot_have(tiny_corpus: TinyCorpus, tmp_path: Path):
    assert probed(tiny_corpus, tmp_path, "model.n_layers=1", sequences=1, seq_len=2) == 0
    found = read(tmp_path)
    assert len(found["layers"]) == 2
    assert "deepscalelm_pre" not in found["verdict"]


def test_rows_of_the_table():
    assert chosen(3, 20) == [0, 1, 2, 3]
    for n_layers in (1, 17, 18, 24, 192, 1000):
        rows = chosen(n_layers, 20)
        assert len(rows) <= 20
        assert rows[:2] == [0, 1]
        assert rows[-1] == n_layers


def test_help_and_bad_keys_answer_at_once():
    started = time.monotonic()
    asked = run_program("probe", "--help")
    assert asked.returncode == 0
    assert "--seq-len" in asked.stdout
    assert "--coordinates" in asked.stdout
    wrong = run_program("probe", "model.depth=3", "--out", "nowhere")
    assert wrong.returncode == 78
    assert "unknown key model.depth" in wrong.stderr
    assert time.monotonic() - started < 30
    assert not Path("nowhere").exists()
    code = "import sys, stablelm.probe.prober; sys.exit('torch' in sys.modules)"
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
