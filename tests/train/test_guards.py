"""Spikes, skipped updates and batches, and the sum by which all ranks learn of them."""

import math
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks
from support.tiny import TinyCorpus

from stablelm.config.schema import Config, DataConfig, GuardsConfig, TrainConfig
from stablelm.data.loader import Loader
from stablelm.engine.interface import StepResult
from stablelm.engine.ranks import Ranks
from stablelm.errors import DivergedError
from stablelm.observe.progress import Progress
from stablelm.tokenizers import load_tokenizer
from stablelm.train.guards import LAG, Guard
from stablelm.train.stop import Outcome, StepExchange, deadline

CONFIG = Config(train=TrainConfig(steps=10, min_lr=0.0))
ALONE = Ranks(0, 1, torch.device("cpu"), None, None)
WINDOW = GuardsConfig(spike="rewind", window=8, threshold=6.0, skip_data=4, max_rewinds=2, max_skips=3)


def outcome(step: int, loss: float = 3.0, norm: float = 1.0, *, skipped: bool = False) -> Outcome:
    return Outcome(step, step - 1, loss, norm, skipped)


def usual(step: int) -> Outcome:
    """Figures that vary by a tenth."""
    return outcome(step, 3.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step))


class Told:
    """A guard, its run's counters and what it said."""

    def __init__(self, config: GuardsConfig = WINDOW):
        self.progress, self.lines = Progress(), []
        self.guard = Guard(config, self.progress, self.lines.append)

    def after(self, steps: int) -> "Told":
        assert self.guard.judge([usual(step) for step in range(1, steps + 1)]) is None
        return self


@pytest.mark.parametrize("spike", [{"loss": 6.0}, {"norm": 4.0}, {"loss": 6.0, "norm": 4.0}])
def test_a_spike_is_found_once_the_window_is_full(spike: dict[str, Any]):
    full = WINDOW.window + LAG
    assert Told().after(full - 2).guard.judge([outcome(full - 1, **spike)]) is None
    told = Told().after(full - 1)
    assert told.guard.judge([outcome(full, **spike)]) == outcome(full, **spike)
    assert told.progress.spikes == 1
    assert all(words in told.lines[0] for words in (f"step {full}: spike", "spreads above"))


def test_figures_that_are_better_than_usual_are_no_spike():
    assert Told().after(20).guard.judge([outcome(21, loss=0.5, norm=0.01)]) is None


def test_spikes_do_not_move_what_they_are_compared_to():
    told = Told(replace(WINDOW, spike="skip")).after(20)
    limit = told.guard.largest_norm(40)
    for step in range(21, 40):
        told.guard.judge([outcome(step, norm=50.0)])
    assert told.progress.spikes == 19
    assert told.guard.largest_norm(40) == limit < 2


def test_the_limit_is_the_median_and_spread_of_the_window():
    told = Told(replace(WINDOW, spike="skip")).after(30)
    norms = [usual(step).grad_norm for step in range(30 + 1 - LAG - WINDOW.window + 1, 30 + 1 - LAG + 1)]
    median = statistics.median(norms)
    spread = 1.4826 * statistics.median(abs(norm - median) for norm in norms)
    assert told.guard.largest_norm(31) == pytest.approx(median + 6 * spread, rel=1e-12)


@pytest.mark.parametrize("spike", ["none", "rewind"])
def test_only_skip_limits_the_norm(spike: Any):
    told = Told(replace(WINDOW, spike=spike)).after(30)
    assert told.guard.largest_norm(31) == math.inf


def test_none_neither_judges_nor_keeps():
    told = Told(replace(WINDOW, spike="none")).after(30)
    assert told.guard.judge([outcome(31, loss=1e9)]) is None
    assert (told.progress.spikes, told.guard.state()["window"]) == (0, [])


def test_early_knowledge_changes_nothing():
    """A save makes the last steps known at once; limits and verdicts are those of a run that learns them later."""
    steps = [usual(step) for step in range(1, 40)]
    known, late = Told(replace(WINDOW, spike="skip")).guard, Told(replace(WINDOW, spike="skip")).guard
    for index, step in enumerate(steps):
        known.judge([step])
        if index >= 2:
            late.judge([steps[index - 2]])
        assert known.largest_norm(step.step + 1) == late.largest_norm(step.step + 1)


def test_updates_left_out_in_a_row_end_the_run():
    told = Told()
    for step in range(1, WINDOW.max_skips + 1):
        told.guard.judge([outcome(step, math.nan, math.nan, skipped=True)])
    told.guard.judge([outcome(4), outcome(5, math.nan, math.nan, skipped=True)])
    with pytest.raises(DivergedError, match=r"4 updates in a row .* up to step 8.*guards.max_skips=3") as caught:
        told.guard.judge([outcome(step, math.nan, math.nan, skipped=True) for step in (6, 7, 8)])
    assert caught.value.exit_code == 76


def test_the_state_comes_back():
    one = Told().after(30)
    one.progress.skipped_steps, one.progress.rewinds = 5, 1
    one.guard.judge([outcome(31, math.inf, math.inf, skipped=True)])
    two = Told()
    two.guard.load(one.guard.state())
    assert two.guard.state() == one.guard.state()
    assert (two.progress.skipped_steps, two.progress.rewinds) == (5, 1)
    old = Told()
    old.guard.load({})
    assert old.guard.state() == Told().guard.state()


def fed(guard: Guard, corpus: TinyCorpus, count: int) -> list[int]:
    """The data steps of a loader that skips what the guard says."""
    data = DataConfig(seq_len=8, lanes=2, workers=0)
    files = sorted(map(str, (corpus.folder / "train").iterdir()))
    loader = Loader(files, load_tokenizer(corpus.tokenizer), data, seed=1, global_batch_size=2)
    loader.skip(guard.jumps)
    return [loader.next().data_step for _ in range(count)]


def test_a_rewind_jumps_over_the_data_around_the_spike(tiny_corpus: TinyCorpus):
    told = Told()
    before = told.guard.state()
    told.guard.load({})
    told.guard.rewound(outcome(11), 4, before)
    assert fed(told.guard, tiny_corpus, 10) == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13]
    assert told.progress.rewinds == 1
    assert "batches 9 to 12 are skipped" in told.lines[-1]


def test_nothing_before_the_checkpoint_is_jumped_over_and_earlier_jumps_stay(tiny_corpus: TinyCorpus):
    told = Told()
    told.guard.rewound(outcome(11), 10, told.guard.state())
    before = told.guard.state()
    told.guard.load({})
    told.guard.rewound(outcome(3), 1, before)
    assert fed(told.guard, tiny_corpus, 10) == [0, 5, 6, 7, 8, 9, 14, 15, 16, 17]
    assert told.progress.rewinds == 2
    with pytest.raises(DivergedError, match=r"guards\.max_rewinds=2"):
        told.guard.may_rewind(outcome(20))


def result(cross_entropy: float, valid: int, norm: float, *, skipped: bool = False) -> StepResult:
    return StepResult(*(torch.tensor(value) for value in (cross_entropy, valid, norm, skipped)))


def test_alone_a_step_is_known_at_once():
    agreement = StepExchange(ALONE)
    assert agreement.exchange(1, 4, result(6.0, 3, 0.5), 2) == (2, [Outcome(1, 4, 2.0, 0.5, False)])
    assert agreement.settle() == []


def exchange_steps(rank: int, world_size: int) -> list:
    group = dist.group.WORLD
    agreement = StepExchange(Ranks(rank, world_size, torch.device("cpu"), group, group))
    told = []
    for step in range(1, 4):
        wish = 2 * (rank == 1 and step >= 2)
        told.append(agreement.exchange(step, step - 1, result(6.0 * (rank + 1) * step, 3, 0.5), wish))
    told.append(agreement.settle())
    return told


def test_all_ranks_learn_the_same_one_step_later():
    one, two = run_ranks(exchange_steps, 2)
    known = [Outcome(step, step - 1, 3.0 * step, 0.5, False) for step in (1, 2, 3)]
    assert one == two == [(0, []), (0, [known[0]]), (2, [known[1]]), [known[2]]]


def disagree(rank: int, world_size: int) -> None:
    group = dist.group.WORLD
    agreement = StepExchange(Ranks(rank, world_size, torch.device("cpu"), group, group))
    agreement.exchange(1, 0, result(1.0, 1, 1.0, skipped=rank == 0), 0)
    agreement.settle()


def test_ranks_that_differ_are_noticed():
    with pytest.raises(RuntimeError, match="1 of 2 ranks skipped the update of step 1"):
        run_ranks(disagree, 2)


@pytest.mark.parametrize(
    ("limit", "environ", "expected"),
    [
        (None, {}, None),
        (50.0, {}, 1050.0),
        (None, {"SLURM_JOB_END_TIME": "1020"}, 1020.0),
        (50.0, {"SLURM_JOB_END_TIME": "1020"}, 1020.0),
        (10.0, {"SLURM_JOB_END_TIME": "1020"}, 1010.0),
        (None, {"SLURM_JOB_END_TIME": "900"}, None),
        (None, {"SLURM_JOB_END_TIME": "Unknown"}, None),
    ],
)
def test_the_earlier_deadline_counts(limit: float | None, environ: dict[str, str], expected: float | None):
    assert deadline(limit, 1000.0, environ) == expected


def test_only_states_of_the_present_course_count():
    told = Told()
    told.guard.rewound(outcome(11), 4, told.guard.state())
    ((first, count),) = told.guard.state()["jumps"]
    assert told.guard.shares(first, [])
    assert not told.guard.shares(first + 1, [])  # it has seen a batch that is jumped over now
    assert told.guard.shares(first + count, [[first, count]])
