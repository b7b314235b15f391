"""The contestants of benchmarks/train_step.py train at a tiny shape; its rounds, records and refusals."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import train_step
from benchmarks.training.contestants import CONTESTANTS, Setting, Trainer, is_peer
from benchmarks.training.one_process import MODULES
from benchmarks.training.shape import Shape

SHAPE = Shape.parse("2x64x1x32")
VOCABULARY = 512


def build(name: str, **changes: Any) -> Trainer:
    """Skips where the library cannot be imported."""
    for module in MODULES[name.partition("-")[0]]:
        try:
            import_module(module)
        except ImportError as error:
            pytest.skip(f"{name}: {error}")
    torch.manual_seed(0)
    setting = Setting(SHAPE, VOCABULARY, "bf16", False, torch.device("cpu"))
    return CONTESTANTS[name](setting._replace(**changes))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_each_contestant_learns_one_batch(name: str, precision: str):
    trainer = build(name, precision=precision)
    text = torch.randint(VOCABULARY, (SHAPE.batch, SHAPE.seq_len + 1), generator=torch.Generator().manual_seed(0))
    losses = [float(trainer.step(text[:, :-1].contiguous(), text[:, 1:].contiguous())) for _ in range(3)]
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.8)
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("name", CONTESTANTS)
def test_sizes_are_as_near_as_widths_allow(name: str):
    trainer, floor = build(name), build("plain-decoder")
    assert trainer.parameters == pytest.approx(floor.parameters, rel=0.04)
    assert trainer.matmul_parameters == pytest.approx(floor.matmul_parameters, rel=0.04)
    assert floor.matmul_parameters == 12 * SHAPE.n_layers * SHAPE.d_model**2 + VOCABULARY * SHAPE.d_model


def arguments(folder: Path, *more: str) -> list[str]:
    sizes = ["--shape", str(SHAPE), f"--vocab={VOCABULARY}", "--warm-up=0", "--steps=1", "--threads=1"]
    return [*sizes, f"--runs={folder}/rounds", f"--out={folder}/out.json", *more]


@pytest.mark.slow
def test_rounds_are_kept_and_become_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    asked = arguments(tmp_path, "--only=plain", "--mode", "eager", "--rounds=1")
    assert train_step.main(asked) == 0
    assert "round 1" in capsys.readouterr().err
    made = {each["metric"]: each for each in json.loads((tmp_path / "out.json").read_text())}
    assert set(made) == set(train_step.UNITS)
    assert {each["name"] for each in made.values()} == {"plain-decoder-eager"}
    assert {each["shape"] for each in made.values()} == {str(SHAPE)}
    assert set(made["tokens_per_second"]) == {"name", "shape", "metric", "median", "low", "high", "unit"}
    assert 0 < made["flops_share"]["median"] < 1
    assert 0 < made["training_memory_bytes"]["median"] < made["peak_memory_bytes"]["median"]
    assert 0 < made["import_seconds"]["median"] < made["first_step_seconds"]["median"]
    assert train_step.main(asked) == 0
    assert capsys.readouterr().err == ""  # nothing ran again
    assert train_step.main([*asked, "--rounds=4", "--sitting=2"]) == 0
    reported = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in reported] == ["round 2", "round 3", "round 4"]
    assert train_step.main([*asked, "--steps=2"]) == 78
    assert "holds rounds of other steps; name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'OSError: no room' >&2; exit 1", "OSError: no room"),
        ("exit 5", "exit code 5"),
        ("sleep 60", "no result within 0.5 s"),
        ("echo hello", "hello"),
        ("echo '{\"parameters\": 1}'; echo gone >&2; exit 1", "gone"),
    ],
)
def test_a_contestant_that_fails_is_named_once(
    script: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f"#!/bin/sh\n{script}\n")
    (venv / "python").chmod(0o755)
    asked = [f"--peers-venv={tmp_path}/venv", "--only=litgpt", "--mode", "eager", "--rounds=3", "--timeout=0.5"]
    assert train_step.main(arguments(tmp_path, *asked)) == 1
    assert capsys.readouterr().err.splitlines() == [f"litgpt-llama-eager failed at {SHAPE}: {reason}"]


def test_what_cannot_be_imported_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text('#!/bin/sh\necho \'{"unavailable": "No module named litgpt"}\'\nexit 3\n')
    (venv / "python").chmod(0o755)
    peers = f"--peers-venv={tmp_path}/venv"
    assert train_step.main(arguments(tmp_path, peers, "--only=litgpt", "--mode", "eager", "--rounds=2")) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [f"litgpt-llama-eager is left out: No module named litgpt (of {venv}/python)"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--only=lightgpt"], "--only lightgpt fits no contestant; they are stablelm-gpt2, "),
        (["--peers-venv=/nowhere"], "--peers-venv /nowhere has no bin/python; make it with python -m venv"),
    ],
)
def test_mistakes_are_one_sentence(asked: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert train_step.main(arguments(tmp_path, *asked)) == 78
    assert told in capsys.readouterr().err
    assert not (tmp_path / "rounds").exists()


def test_the_share_is_of_the_best_matmuls_of_a_round(tmp_path: Path):
    for entry, peak in (("plain-decoder-eager", 4e12), ("stablelm-gpt2-eager", 5e12)):
        found = {"flops_per_second": 1e12, "matmul_flops_per_second": peak}
        found |= {"peak_memory_bytes": 9, "import_memory_bytes": 4}
        (tmp_path / f"12x384x4x512-{entry}-3.json").write_text(json.dumps(found))
    rounds = train_step.read_rounds(tmp_path)
    assert [each[3]["flops_share"] for each in rounds.values()] == [0.2, 0.2]
    assert rounds["12x384x4x512", "stablelm-gpt2-eager"][3]["training_memory_bytes"] == 5


def test_who_goes_on_after_the_first_round():
    def first(rate: float, memory: float) -> dict[int, dict[str, float]]:
        return {0: {"tokens_per_second": rate, "peak_memory_bytes": memory}}

    measured = {
        "stablelm-gpt2-eager": first(90, 6),
        "stablelm-pre_ln-eager": first(95, 5),
        "stablelm-pre_ln-compiled": first(120, 5),
        "litgpt-llama-eager": first(60, 7),
        "litgpt-llama-compiled": first(100, 9),
        "transformers-gpt2-eager": first(50, 6),
        "transformers-gpt2-compiled": first(70, 8),
        "plain-decoder-eager": first(80, 9),
    }
    rounds = {("12x384x4x512", entry): found for entry, found in measured.items()}
    assert train_step.finalists(rounds, "12x384x4x512", [*measured], 99) == [
        *("stablelm-pre_ln-eager", "stablelm-pre_ln-compiled"),
        *("litgpt-llama-compiled", "transformers-gpt2-eager", "transformers-gpt2-compiled", "plain-decoder-eager"),
    ]
    assert train_step.finalists(rounds, "2x64x1x32", [*measured], 99) == []
    less = train_step.finalists(rounds, "12x384x4x512", [*measured], 34)  # the leanest of ours is among the quickest
    assert "transformers-gpt2-compiled" not in less and len(less) == 5


def test_the_groups_of_names():
    assert [name for name in CONTESTANTS if is_peer(name)] == [
        *("litgpt-llama", "transformers-gpt2", "transformers-llama", "x-transformers", "torchtitan-llama")
    ]
    for text in ("12x384x4", "0x64x1x8", "2x65x1x8", "axbxcxd"):
        with pytest.raises(ValueError, match=r"\d|x"):
            Shape.parse(text)
