"""The program: its figures, its words, its errors; and the configurations that it is meant for."""

import json
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planned import SHAPE, planned
from support.programs import run as run_program
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.config.memory_rules import RESERVE
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.observe.accelerators import ACCELERATORS
from stablelm.plan import remedies
from stablelm.plan.collectives import collectives
from stablelm.plan.planner import make, plan
from stablelm.plan.request import prepare
from stablelm.plan.step_time import step_time

RUNS = sorted((REPOSITORY / "configs" / "runs").glob("c4-*b-*.yaml"))
SMALL = [*SHAPE, "model.vocab_size=320", "train.global_batch_size=8", "train.precision=bf16", "data.seq_len=32"]


def planned_text(capsys: pytest.CaptureFixture[str], *overrides: str, world_size: int = 4, **options: Any) -> str:
    options = {"simulated": False} | options
    assert plan([], [*SMALL, *overrides], world_sizes=(world_size,), **options) == 0
    return capsys.readouterr().out


def test_figures_of_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    shown = planned_text(capsys, "engine.kind=fsdp2", simulated=True, out=str(out))
    found = json.loads(out.read_text())
    config = prepare(load([], [*SMALL, "engine.kind=fsdp2"]), 4, "h100-80", 8).config
    assert found["parameters"]["total"] == parameter_counts(config.model)["total"]
    assert sum(found["parameters"].values()) == 2 * found["parameters"]["total"]
    assert sum(found["peak_bytes"].values()) == 2 * found["peak_bytes"]["total"]
    assert found["resting_bytes"]["moments"] == 2 * found["resting_bytes"]["weights"]
    assert found["collectives"]["reduce_scatter"]["count"] == 3  # the layers, the embedding, the head
    assert found["simulated_layers"] == 4 and found["exact"] and found["fits"]
    assert found["estimated"]["flops"] == flops_per_token(config.model, 32) * 8 * 32
    for words in ("4 x h100-80 on 1 node", "fsdp2", "embedding", "all-gather", "MFU", "fits           yes", "dry run"):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"])
def test_every_kind_of_engine(kind: str, capsys: pytest.CaptureFixture[str]):
    assert f"{kind}" in planned_text(capsys, f"engine.kind={kind}")


def test_what_does_not_fit_is_shown_with_what_would(capsys: pytest.CaptureFixture[str]):
    large = ["model.method=deepscalelm_pre", "model.n_layers=96", "model.d_model=4096", "model.n_heads=32"]
    large += ["data.seq_len=2048", "train.global_batch_size=1024", "train.micro_batch_size=2", "train.precision=bf16"]
    arguments = ["train.steps=5", "model.vocab_size=32000", "data.lanes=1024", *large]
    assert plan([], arguments, world_sizes=(8,), simulated=False) == 0
    shown = capsys.readouterr().out
    assert "fits           no" in shown
    changes = shown.split("would fit")[1].split(" (about")[0].split()
    world_size = 8
    if changes[0] == "--world-size":
        world_size, changes = int(changes[1]), changes[2:]
    assert plan([], [*arguments, *changes], world_sizes=(world_size,), simulated=False) == 0
    assert "fits           yes" in capsys.readouterr().out


def test_remedies_come_in_order_and_may_be_none():
    config = planned("train.precision=bf16", "model.n_layers=40", world_size=8, micro_batches=4, kind="fsdp2")
    listed = rank_memory.parameters(config)

    def layout_of(of, ranks):
        return rank_memory.make_layout(of, of.engine.kind, ranks, 1)

    def first(limit: float):
        return remedies.first_that_fits(config, listed, 8, limit, 1.0, layout_of)

    now = estimate.peak(config, listed, layout_of(config, 8)).total()
    unchanged = first(now)
    assert unchanged is not None and unchanged.arguments == ()
    recompute = first(0.9 * now)
    assert recompute is not None
    assert recompute.arguments == ("engine.recompute=full",)
    assert recompute.peak <= 0.9 * now
    assert first(1000) is None


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "hsdp", "zero3"])
def test_estimated_time_adds_up(kind: str):
    eager = ("train.precision=bf16", "model.d_model=256", "train.compile=false")
    config = planned(*eager, world_size=16, kind=kind)
    listed, layout = rank_memory.parameters(config), rank_memory.make_layout(config, kind, 16, 2)
    moved = collectives(config, listed, layout)
    accelerator = ACCELERATORS["h100-80"]

    def timed(**options):
        arguments = {"gpus_per_node": 8, "operations": None} | options
        return step_time(config, listed, layout, moved, accelerator, **arguments)

    found = timed()
    assert found.total == pytest.approx(
        found.matmul + found.memory_bound + found.exposed + found.update + found.offload
    )
    assert 0 < found.mfu < 0.7
    assert found.exposed <= found.gather + found.reduce
    assert timed(operations=10**6).total > found.total
    config = replace(config, train=replace(config.train, compile="auto"))
    assert (timed(operations=10**6).host == 0) == (kind != "zero3")  # plan means GPUs, where auto compiles
    config = replace(config, train=replace(config.train, compile=False))
    assert timed(gpus_per_node=1).gather + timed(gpus_per_node=1).reduce > found.gather + found.reduce
    slower = step_time(config, listed, layout, moved, replace(accelerator, peak=1e12), gpus_per_node=8, operations=None)
    assert slower.total > found.total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "8", "--gpu", "h1000"], "--gpu h1000 is not in the table, did you mean h100-80?"),
        (["--world-size", "8", "--peak-tflops", "312"], "also needs --memory-gb and --bandwidth"),
        (
            ["--world-size", "8", "--gpu", "h200", "--peak-tflops", "1", "--memory-gb", "9", "--bandwidth", "99"],
            "--gpu h200 is in the table, so --peak-tflops and --memory-gb and --bandwidth cannot describe it",
        ),
        (["--world-size", "0"], "--world-size 0 must be at least 1"),
        (["--world-size", "8", "--gpus-per-node", "0"], "--gpus-per-node 0 must be at least 1"),
        (["--world-size", "12"], "--world-size 12 does not fill nodes of --gpus-per-node 8; use 8 or 16"),
        (["--world-size", "3"], "train.global_batch_size=8 must be divisible by the number of processes, 3"),
        (["--world-size", "2", "engine.kind=single"], "engine.kind=single cannot use the 2 processes"),
        (["--world-size", "4", "engine.unit_bytes=0"], "engine.unit_bytes=0 must be at least 1"),
        (["--world-size", "4", "--out", "/nowhere/at/all.json"], "its folder does not exist"),
        (["--world-size", "4", "data.tokenizer=/no/such.model", "model.vocab_size=null"], "/no/such.model"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    main = runpy.run_path(str(REPOSITORY / "launch" / "plan.py"))["main"]
    assert main([*SMALL, *arguments]) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert words in shown.err
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1


def test_help_is_quick_and_the_program_runs(tmp_path: Path):
    started = time.perf_counter()
    line = [sys.executable, str(REPOSITORY / "launch" / "plan.py"), "--help"]
    help_text = subprocess.run(line, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert help_text.returncode == 0 and "--world-size" in help_text.stdout
    assert seconds < 5  # half a second on an idle machine
    bad = run_program("plan", *SMALL, "--world-size", "8", "--gpu", "abacus", cwd=tmp_path)
    assert bad.returncode == 78
    assert list(tmp_path.iterdir()) == []
    assert run_program("plan", *SMALL, "--world-size", "1", "--quick", cwd=tmp_path).returncode == 0


def test_help_needs_no_torch():
    code = "import sys; sys.argv = ['plan', '--help']; sys.path.insert(0, 'launch')\n"
    code += "import plan\ntry: plan.main()\nexcept SystemExit: pass\nassert not {'torch', 'yaml'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True).returncode == 0


@pytest.mark.parametrize("path", RUNS, ids=[path.stem for path in RUNS])
def test_shipped_configs_have_their_size_and_fit(path: Path):
    """The name says parameters and layers; the closed form, a little above the simulation, fits what it says."""
    _, size, layers = path.stem.split("-")
    ranks = 64 if "64 x 80 GB" in path.read_text() else 8
    made = make(prepare(load([str(path)], []), ranks, "h100-80", 8, simulated=False))
    config = made.request.config
    assert config.model.n_layers == int(layers)
    total = parameter_counts(config.model)["total"]
    assert total == pytest.approx(1e9 * float(size.removesuffix("b")), rel=0.02)
    assert made.fits
    assert made.peak.total() <= 80e9 - RESERVE
    assert config.model.d_model % 64 == 0
    assert config.model.d_model // config.model.n_heads in (64, 128)
    assert config.train.precision == "bf16" and config.data.seq_len == 2048


def test_twins_have_equal_parameters():
    totals: dict[str, list[int]] = {}
    for path in RUNS:
        config = prepare(load([str(path)], []), 64, "h100-80", 8).config
        totals.setdefault(path.stem.split("-")[1], []).append(parameter_counts(config.model)["total"])
    assert len(totals) == 3
    for pair in totals.values():
        assert len(pair) == 2
        assert max(pair) / min(pair) < 1.01


def test_auto_reports_the_peak_of_each_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    shown = planned_text(capsys, "engine.kind=fsdp2", "engine.recompute=auto", out=str(out))
    peaks = json.loads(out.read_text())["recompute_peaks"]
    assert list(peaks) == ["none", "selective", "every:4", "attention", "every:2", "full"]
    assert peaks["full"] < peaks["none"]
    assert "recompute none" in shown and "recompute auto none; predicted peak of a rank: none " in shown
    assert max(map(len, shown.splitlines())) <= 80
    limit = f"engine.memory_limit={peaks['full']}"
    assert "recompute full" in planned_text(capsys, "engine.kind=fsdp2", "engine.recompute=auto", limit)


@pytest.mark.parametrize(("moments", "bytes_"), [("fp32", 8.0), ("bf16", 4.0), ("int8", 2.0)])
def test_moments_of_fewer_bytes_are_counted(moments: str, bytes_: float, tmp_path: Path):
    out = tmp_path / "plan.json"
    settings = [f"train.moments={moments}", "engine.kind=fsdp2", "model.d_model=256"]
    assert plan([], [*SMALL, *settings], world_sizes=(4,), out=str(out)) == 0
    held = json.loads(out.read_text())
    # int8: a scale for each block of 256 elements, and vectors in fp32.
    assert held["resting_bytes"]["moments"] / held["resting_bytes"]["weights"] * 4 == pytest.approx(bytes_, rel=0.06)
    assert held["peak_bytes"]["moments"] == held["resting_bytes"]["moments"]


def test_updates_in_the_backward_pass_hold_one_gradient():
    deep = ("train.grad_clip=0", "train.micro_batch_size=8", "model.n_layers=40", "engine.recompute=full")
    plain, hooked = (
        make(prepare(load([], [*SMALL, *deep, *more]), 1, "h100-80", 8, simulated=False)).peak
        for more in ((), ("engine.optimizer_in_backward=true",))
    )
    weights = plain["weights"]
    assert plain.total() - hooked.total() > 0.7 * weights
