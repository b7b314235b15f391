"""Hours, money and energy, and the table over numbers of GPUs."""

import json
import runpy
from pathlib import Path

import pytest
from planned import SHAPE
from support.samples import REPOSITORY

from stablelm.config.load import load
from stablelm.plan.output.units import duration, money, number
from stablelm.plan.planner import compare, make
from stablelm.plan.request import prepare, prepare_each

SMALL = [*SHAPE, "model.vocab_size=320", "train.global_batch_size=48", "train.precision=bf16", "train.steps=7000"]


def run(*arguments: str) -> int:
    return runpy.run_path(str(REPOSITORY / "launch" / "plan.py"))["main"]([*SMALL, *arguments])


def test_hours_cost_and_energy_follow_from_the_rate(capsys: pytest.CaptureFixture[str]):
    made = make(prepare(load([], SMALL), 8, "h100-80", 8, simulated=False, price=2.49), depth=False)
    cost = made.cost
    assert cost.dollars is not None and cost.kilowatt_hours is not None
    assert cost.tokens == 7000 * 48 * 64 and cost.steps == 7000
    assert cost.hours == cost.tokens / made.time.tokens_per_second / 3600
    assert cost.hours == pytest.approx(7000 * made.time.total / 3600, rel=1e-12)
    assert cost.gpu_hours == 8 * cost.hours
    assert cost.dollars == cost.gpu_hours * 2.49
    assert cost.kilowatt_hours == pytest.approx(cost.gpu_hours * 0.7, rel=1e-12)  # 700 W each
    assert run("--world-size", "8", "--quick", "--price", "2.49") == 0
    shown = capsys.readouterr().out
    assert f"{number(cost.gpu_hours)} GPU-hours; {money(cost.dollars)} at $2.49 per GPU-hour" in shown
    assert f"at most {number(cost.kilowatt_hours)} kWh (700 W per GPU" in shown


@pytest.mark.parametrize(
    ("hours", "words"),
    [
        (0.004, "14.4 seconds"), (0.5, "30.0 minutes"), (5.25, "5.25 hours"), (26.48, "26.5 hours"),
        (96, "96.0 hours (4.0 days)"), (4380, "4,380 hours (182.5 days)"),
    ],
)  # fmt: skip
def test_durations_and_money(hours: float, words: str):
    assert duration(hours) == words
    assert (money(0.001), money(1234.567), number(0.012345)) == ("less than $0.01", "$1,234.57", "0.0123")


def test_a_ramp_costs_the_tokens_of_its_steps(capsys: pytest.CaptureFixture[str]):
    """Memory and rate are those of the largest step, tokens and time those of the whole ramp."""
    ramp = "train.global_batch_size={0: 16, 1000: 48, 6000: 16}"
    steady, made = (
        make(prepare(load([], [*SMALL, *more]), 8, "h100-80", 8, simulated=False), depth=False) for more in ([], [ramp])
    )
    assert made.cost.tokens == (2000 * 16 + 5000 * 48) * 64
    assert made.peak == steady.peak and made.time.tokens_per_second == steady.time.tokens_per_second
    assert made.cost.hours == pytest.approx(steady.cost.hours * 17 / 21, rel=1e-12)
    assert run("--world-size", "8", "--quick", ramp) == 0
    assert "up to 48 sequences of 64 tokens" in capsys.readouterr().out


def test_what_is_not_known_is_said(capsys: pytest.CaptureFixture[str]):
    described = ["--gpu", "mine", "--peak-tflops", "100", "--memory-gb", "40", "--bandwidth", "1000"]
    assert run("--world-size", "8", "--quick", *described) == 0
    shown = capsys.readouterr().out
    assert "8 x mine on 1 node" in shown
    assert "100 TFLOPS bf16; GB/s: memory 1,000, links 32, network 25" in shown
    assert "GPU-hours; in dollars with --price" in shown
    assert "unknown without --watts" in shown


def test_tokens_set_the_length(capsys: pytest.CaptureFixture[str]):
    """Whole steps that see at least as many tokens, as a run takes."""
    assert run("--world-size", "8", "--quick", "train.steps=null", "train.tokens=1e6") == 0
    assert "for 1,001,472 tokens in 326 steps" in capsys.readouterr().out


def test_a_table_has_the_plans_of_its_world_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "table.json"
    assert run("--world-sizes", "8,1,24,5,16,12,24", "--quick", "--price", "3", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    rows = json.loads(out.read_text())["world_sizes"]
    assert [row["world_size"] for row in rows] == [8, 1, 24, 5, 16, 12]
    for row in rows:
        if "problem" in row:
            continue
        alone = make(prepare(load([], SMALL), row["world_size"], "h100-80", 8, simulated=False, price=3), depth=False)
        assert row["peak_bytes"]["total"] == alone.peak.total()
        assert row["estimated"]["total"] == alone.time.total
        assert row["cost"]["dollars"] == alone.cost.dollars
        assert f"{row['world_size']} " in shown and f"{alone.time.tokens_per_second:,.0f}" in shown
    problems = {row["world_size"]: row["problem"] for row in rows if "problem" in row}
    assert list(problems) == [5, 16, 12]
    assert "train.global_batch_size=48 must be divisible by the number of processes, 5" in problems[5]
    assert "train.micro_batch_size=2 on 16 processes does not divide" in problems[16]
    assert "--world-size 12 does not fill nodes" in problems[12]
    folded = " ".join(shown.split())
    assert all(" ".join(problem.split()) in folded for problem in problems.values())


@pytest.mark.slow
def test_a_table_of_dry_runs_has_the_figures_of_single_ones():
    """One dry run serves several numbers of GPUs: its operations are theirs, and the peak within half a percent."""
    loaded = load([], [*SMALL, "engine.kind=fsdp2", "train.micro_batch_size=1", "model.d_model=72", "data.seq_len=32"])
    sizes = (2, 8, 24, 48)
    table = compare(sizes, *prepare_each(loaded, sizes, "h100-80", 8))
    for ranks in sizes:
        alone, shared = make(prepare(loaded, ranks, "h100-80", 8), depth=False), table.plans[ranks]
        assert alone.simulation is not None and shared.simulation is not None
        assert shared.peak.total() == pytest.approx(alone.peak.total(), rel=0.005)
        assert shared.simulation.resting == alone.simulation.resting
        assert shared.simulation.gradients == alone.simulation.gradients
        assert shared.simulation.operations == pytest.approx(alone.simulation.operations, rel=0.01)
        assert shared.simulation.exact == (ranks in (2, 48))  # 48 ranks take one micro-batch each
        assert shared.moved == alone.moved


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--world-size", "8", "--price", "0"], "--price 0 must be a positive number of dollars per GPU-hour"),
        (["--world-size", "8", "--price", "-2"], "--price -2 must be a positive number"),
        (["--world-size", "8", "--price", "inf"], "--price inf must be a positive number"),
        (["--world-size", "8", "--price", "nan"], "--price nan must be a positive number"),
        (["--world-size", "8", "--price", "two"], "argument --price: invalid float value: 'two'"),
        (["--world-sizes", "8,x"], "'x' is not an integer of at least 1, as in 8,16,32"),
        (["--world-sizes", "8,1.5"], "'1.5' is not an integer of at least 1"),
        (["--world-sizes", "8,,16"], "'' is not an integer of at least 1"),
        (["--world-sizes", "8,0"], "'0' is not an integer of at least 1"),
        (["--world-sizes", "5,7"], "the number of processes, 7"),
        (["--world-sizes", "8", "--world-size", "8"], "not allowed with argument"),
        ([], "one of the arguments --world-size --world-sizes is required"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    try:
        code = run(*arguments)
    except SystemExit as error:
        code = error.code
    assert code == 78
    shown = capsys.readouterr()
    assert shown.out == "" and words in shown.err and "Traceback" not in shown.err
