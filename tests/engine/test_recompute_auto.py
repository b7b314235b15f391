"""engine.recompute=auto: the cheapest mode that fits, what is chosen from, and what is said where nothing fits."""

import dataclasses
from pathlib import Path

import pytest
import torch
from matrix import configuration, make_ranks, run_steps

from stablelm.config.schema import Config
from stablelm.engine.interface import build_engine
from stablelm.engine.peak_memory import choice, estimate, limit, rank_memory
from stablelm.errors import ConfigError

ALONE = make_ranks(0, 1)
AUTO = ("engine.recompute=auto", "model.n_layers=24", "data.seq_len=64")
"""Of so many layers and tokens that what they keep is most of the memory."""


def peak(config: Config, mode: str) -> int:
    concrete = choice.with_mode(config, mode)
    layout = rank_memory.make_layout(concrete, "single", 1, 1)
    return estimate.peak(concrete, rank_memory.parameters(concrete), layout).total()


def limited(bytes_: float, *overrides: str) -> Config:
    return configuration(*AUTO, f"engine.memory_limit={bytes_}", *overrides)


def test_each_limit_gets_the_first_mode_that_fits():
    config = configuration(*AUTO)
    peaks = {mode: peak(config, mode) for mode in choice.MODES}
    assert peaks["none"] > peaks["every:4"] > peaks["every:2"] > peaks["full"]
    assert peaks["selective"] < peaks["none"] and peaks["attention"] < peaks["none"]
    for bytes_ in sorted(peaks.values()):
        found, words = choice.resolved(limited(bytes_), "single", ALONE)
        wanted = next(mode for mode in choice.MODES if peaks[mode] <= bytes_)
        assert found.engine.recompute == wanted
        assert words.startswith(f"engine.recompute=auto is {wanted}; predicted peak of a rank: none ")


def test_a_chosen_mode_trains_as_none_does():
    config = limited(peak(configuration(*AUTO), "full"))
    engine = build_engine(config, "single", ALONE)
    plain = choice.with_mode(config, "none")
    expected = run_steps(build_engine(plain, "single", ALONE), ALONE, plain, 1, 2)
    assert run_steps(engine, ALONE, config, 1, 2) == expected


def test_where_nothing_fits_a_sentence_says_by_how_much():
    with pytest.raises(ConfigError) as caught:
        choice.resolved(limited(1e5), "single", ALONE)
    assert caught.value.exit_code == 78
    for words in (
        "engine.recompute=auto: the predicted peak of a rank is 0.0",
        "with full, the leanest mode, and engine.memory_limit is 0.00 GB; use train.micro_batch_size=6 or "
        "train.moments=bf16 or more processes with engine.kind=fsdp2 or fewer layers",
    ):
        assert words in str(caught.value)


def test_modes_that_are_refused_are_not_chosen():
    for overrides, kind in ((("train.compile=true", "model.method=catformer"), "single"), ((), "zero3")):
        config = configuration(*AUTO, *overrides)
        layout = rank_memory.make_layout(config, kind, 2, 1)
        assert "selective" not in choice.choose(config, layout, 0.0).peaks


def test_no_period_is_longer_than_the_model():
    config = configuration("engine.recompute=auto", "model.n_layers=3")
    assert "every:4" not in choice.choose(config, rank_memory.make_layout(config, "single", 1, 1), 0.0).peaks


def test_memory_that_is_available_here():
    found = limit.available(ALONE)
    assert 0 < found < 1e15
    both = dataclasses.replace(ALONE, world_size=2)
    assert limit.available(both) == pytest.approx(found / 2, rel=0.2)


def test_a_jobs_group_limits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The files of both versions of Linux's control groups, as documented."""
    job = tmp_path / "slurm" / "job_1"
    job.mkdir(parents=True)
    monkeypatch.setattr(limit, "OWN", tmp_path / "own")
    monkeypatch.setattr(limit, "VERSION_2", (tmp_path, *limit.VERSION_2[1:]))
    (tmp_path / "own").write_text("0::/slurm/job_1\n")
    for name, text in (("memory.max", "max"), ("memory.current", "5"), ("memory.stat", "anon 3\ninactive_file 2\n")):
        (job / name).write_text(f"{text}\n")
    before = limit.available(ALONE)
    assert before > 1e6  # `max` is no limit
    (job.parent / "memory.max").write_text("1000000\n")
    (job.parent / "memory.current").write_text("400000\n")
    (job.parent / "memory.stat").write_text("inactive_file 100000\n")
    assert limit.available(ALONE) == pytest.approx(limit.SHARE * 700000)


def test_evaluation_recomputes_nothing():
    engine = build_engine(limited(1.0), "single", ALONE, train=False)
    tokens, one = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    assert engine.scores(tokens, one, one).greedy.shape == (1,)
