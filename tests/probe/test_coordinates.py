"""The coordinate check: slopes, what passes, and its command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny import TinyCorpus

from stablelm.errors import ConfigError
from stablelm.probe.coordinate_check import check, in_words, parse
from stablelm.probe.coordinates import FIGURES, LIMIT, STEPS, SizeSeries

BASE = ["model.n_layers=2", "model.d_model=16", "model.n_heads=2", "train.steps=5", "data.seq_len=24", "data.lanes=12"]


def line(slopes: dict[str, float], sizes: tuple[int, ...] = (2, 8, 32)) -> SizeSeries:
    figures = np.ones((len(sizes), STEPS + 1, len(FIGURES)))
    for name, slope in slopes.items():
        figures[:, -1, FIGURES.index(name)] = [3 * size**slope for size in sizes]
    return SizeSeries("depth", sizes, 64, figures)


def test_slopes_are_of_the_last_step_in_log_log():
    found = line({"stream": 0.5, "logits": -0.25})
    assert found.slopes() == pytest.approx({**dict.fromkeys(FIGURES, 0.0), "stream": 0.5, "logits": -0.25})
    assert found.growing() == ["stream"]
    assert line({"stream": LIMIT - 0.01, "branches": -1.0}).growing() == []


def test_what_is_not_finite_does_not_pass():
    found = line({})
    found.figures[2, -1, FIGURES.index("logits")] = math.inf
    assert math.isnan(found.slopes()["logits"])
    assert found.growing() == ["logits"]


def test_words():
    assert in_words([line({})])[-1] == "passed: after the last step no size grows with a slope above 0.2"
    said = in_words([line({"stream": 0.5, "logits": 0.3})])
    assert said[0].startswith("slope in depth (2, 8, 32 layers): stream +0.50, change of the stream +0.00")
    assert said[1] == "failed: stream with depth, logits with depth grow with a slope above 0.2"


def test_the_form_of_the_argument():
    assert parse("depths=2,8,32,widths=64,128,256") == ((2, 8, 32), (64, 128, 256))
    assert parse("widths=64,128") == ((), (64, 128))
    for wrong, words in (
        ("2,8", "'2' is wrong"),
        ("depths=2,eight", "'eight' is wrong"),
        ("depth=2,8", "'depth=2' is wrong"),
        ("depths=0,8", "'depths=0' is wrong"),
        ("depths=2,2,8", "names 2 twice"),
        ("depths=2,widths=64", "nothing to compare"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(wrong)


def checked(corpus: TinyCorpus, out: Path, text: str, *overrides: str) -> tuple[int, dict]:
    given = [*BASE, *corpus.overrides(), *overrides]
    code = check([], given, text, out=str(out), sequences=2, seq_len=24)
    return code, json.loads((out / "coordinates.json").read_text()) if code == 0 else {}


@pytest.mark.slow
def test_completep_passes_and_pre_ln_does_not(tiny_corpus: TinyCorpus, tmp_path: Path):
    both, rate = "depths=2,6,18,widths=16,32,64", "train.lr=1e-2"
    scaled = ["model.method=completep", "model.completep.base_width=16", "train.eps=1e-12"]
    code, good = checked(tiny_corpus, tmp_path / "completep", both, rate, *scaled)
    assert (code, good["passed"]) == (0, True)
    assert all(slope <= 0.2 for axis in good["axes"].values() for slope in axis["slopes"].values())
    code, bad = checked(tiny_corpus, tmp_path / "pre_ln", both, rate)
    assert (code, bad["passed"]) == (0, False)
    assert "stream" in bad["axes"]["depth"]["growing"]
    assert bad["axes"]["width"]["growing"]
    assert bad["axes"]["depth"]["slopes"]["stream"] > 0.4


def test_files(tiny_corpus: TinyCorpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, found = checked(tiny_corpus, tmp_path, "widths=16,32", "model.kv_heads=1", "train.precision=bf16")
    assert code == 0
    said = capsys.readouterr().out
    assert "slope in width (16, 32 d_model): stream " in said
    assert ("passed" if found["passed"] else "failed") in said
    assert (found["method"], found["lr"], list(found["axes"])) == ("pre_ln", 3e-4, ["width"])
    axis = found["axes"]["width"]
    assert (axis["sizes"], axis["fixed"]) == ([16, 32], 2)
    assert {name: np.shape(rows) for name, rows in axis["figures"].items()} == dict.fromkeys(FIGURES, (2, STEPS + 1))
    assert axis["figures"]["stream_change"][0][0] == 0 < axis["figures"]["stream_change"][0][1]
    assert (tmp_path / "coordinates.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coordinates.json", "coordinates.png"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("widths=16,20", "--coordinates widths=20 gives no whole model.n_heads in the ratio 2/16"),
        ("depths=2", "nothing to compare"),
    ],
)
def test_bad_input(tiny_corpus: TinyCorpus, tmp_path: Path, capsys, text: str, words: str):
    out = tmp_path / "out"
    assert checked(tiny_corpus, out, text)[0] == 78
    assert words in capsys.readouterr().err
    assert not out.exists()
