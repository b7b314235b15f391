"""The table of goals: from rounds and records that are made up to ratios, and what is printed when nothing ran."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import deepest, goals, step_profile
from benchmarks.goals import Reached, checkpoint_rows, loader_rows, method_rows, table, training_rows


def rounds_of(rates: dict[tuple[str, str], list[float]], **other: float) -> goals.Rounds:
    """Rounds of given tokens a second; all else is equal but what `other` says."""
    base: dict[str, Any] = {"peak_memory_bytes": 1e9, "first_step_seconds": 10.0, "flops_share": 0.5, **other}
    return {
        key: {number: {**base, "tokens_per_second": rate} for number, rate in enumerate(values)}
        for key, values in rates.items()
    }


def test_ratios_are_of_one_round_and_of_the_best_by_median():
    shape = "12x384x4x512"
    rounds = rounds_of(
        {
            (shape, "stablelm-gpt2-compiled"): [130.0, 260.0, 120.0],
            (shape, "stablelm-pre_ln-compiled"): [100.0, 200.0, 100.0],
            (shape, "litgpt-llama-compiled"): [90.0, 90.0, 90.0],
            (shape, "litgpt-llama-eager"): [100.0, 200.0, 100.0],
            (shape, "plain-decoder-compiled"): [125.0, 250.0, 125.0],
        }
    )
    by_name = {row.what: row for row in training_rows(rounds)}
    peer = by_name["tokens/s: stablelm-gpt2-compiled / litgpt-llama-eager"]
    assert (peer.median, peer.low, peer.high) == pytest.approx((1.3, 1.25, 1.3))
    assert peer.met and peer.goal == 1.25
    plain = by_name["tokens/s: stablelm-gpt2-compiled / plain-decoder-compiled"]
    assert plain.median == pytest.approx(1.04) and not plain.met
    memory = [row for name, row in by_name.items() if name.startswith("peak memory")]
    assert [(row.median, row.met, row.at_least) for row in memory] == [(1.0, False, False)] * 2


def test_the_start_of_deep_models():
    shallow, deep = "12x384x4x512", "192x256x1x256"
    rounds = rounds_of({(shallow, "stablelm-gpt2-compiled"): [1.0, 1.0], (deep, "stablelm-gpt2-compiled"): [1.0, 1.0]})
    rounds |= rounds_of({(deep, "transformers-gpt2-compiled"): [1.0, 1.0]}, first_step_seconds=200.0)
    rounds[deep, "stablelm-gpt2-compiled"][0]["first_step_seconds"] = 12.0
    del rounds[deep, "stablelm-gpt2-compiled"][1]["first_step_seconds"]  # a round with compiled code from before
    by_name = {row.what.partition(":")[0]: row for row in training_rows(rounds) if "first step" in row.what}
    assert by_name["start to first step"].median == pytest.approx(0.06) and by_name["start to first step"].met
    assert by_name["first step, deepest / shallowest"].median == pytest.approx(1.2)


def record(name: str, metric: str, median: float) -> dict[str, Any]:
    return {"name": name, "shape": "s", "metric": metric, "median": median, "low": median, "high": median, "unit": ""}


def test_rows_of_the_other_benchmarks():
    made = [record("sigma_reparam", "step_time_ratio", 1.1), record("catformer compiled", "step_time_ratio", 1.3)]
    made += [record("pre_ln", "step_time_ratio", 1.0), record("magneto", "step_seconds", 2.0)]
    assert [(row.what, row.met) for row in method_rows(made)] == [
        ("step: sigma_reparam / pre_ln", True),
        ("step: catformer compiled / pre_ln", False),
    ]
    made = [record("loader workers=1", "wall_rate", 120.0), record("loader workers=2", "wall_rate", 110.0)]
    made += [record("datasets lists", "wall_rate", 100.0), record("datasets arrow", "wall_rate", 80.0)]
    (row,) = loader_rows(made, "two cores")
    assert row.what == "streaming, two cores: loader workers=1 / datasets lists"
    assert row.median == pytest.approx(1.2) and row.met
    (row,) = checkpoint_rows([record("stablelm", "stall_share", 0.11), record("stablelm", "load", 1.0)])
    assert not row.met
    (row,) = goals.depth_rows([record("1,100 layers", "peak_memory_bytes", 15e9)])
    assert row.met and row.median == 15 / 16


def test_the_table():
    text = table([Reached("tokens/s: a / b", "12x384x4x512", 1.301, 1.2, 1.4, 1.25, True)])
    assert text.splitlines()[2] == "| tokens/s: a / b | 12x384x4x512 | 1.30 | 1.20 to 1.40 | ≥ 1.25 | yes |"


def test_the_table_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "checkpoints.json").write_text(json.dumps([record("stablelm", "stall_share", 0.05)]))
    assert goals.main([f"--runs={tmp_path}", "--table-only"]) == 0
    assert "| 0.05 | 0.05 to 0.05 | ≤ 0.10 | yes |" in capsys.readouterr().out
    assert json.loads((tmp_path / "goals.json").read_text())[0]["median"] == 0.05


@pytest.mark.slow
def test_the_memory_of_a_run(tmp_path: Path):
    peak = deepest.peak_of_run({"model.n_layers": 2, "model.d_model": 64, "model.n_heads": 1}, tmp_path, steps=1)
    assert 0.2e9 < peak < 2e9
    with pytest.raises(RuntimeError, match=r"exit code 78: .*model.n_layers"):
        deepest.peak_of_run({"model.n_layers": 0}, tmp_path, steps=1)


def test_shares_of_operators(tmp_path: Path):
    out = tmp_path / "profile.json"
    asked = ["--shape", "2x64x1x32", "--mode", "eager", "--vocab=256", f"--out={out}"]
    assert step_profile.main(asked) == 0
    rows = json.loads(out.read_text())
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert {"aten::mm", "all others"} <= {row["operator"] for row in rows}
