"""The soak's plan and the checks that decide whether it passed; no Slurm needed."""

import random
from collections import Counter
from pathlib import Path

import pytest
from support.punisher import KINDS, plan
from support.soak_report import (
    TOKENS_A_STEP,
    bad_commits,
    bad_end,
    ends,
    not_struck,
    other_records,
    recomputed,
    too_much_again,
)
from support.soaking import Strike

from stablelm.checkpoint import manifest


def test_thirty_faults_are_of_all_kinds_at_least_twice_and_repeatable():
    planned = plan(30, list(KINDS), random.Random(1))
    assert len(planned) == 30 and set(planned) == set(KINDS)
    assert min(Counter(planned).values()) >= 2
    assert planned == plan(30, list(KINDS), random.Random(1)) != plan(30, list(KINDS), random.Random(2))


def made(*attempts: tuple[int, int, int]) -> list[dict]:
    """Records of (attempt, first step, last step), as an undisturbed run has them."""
    return [
        {"step": step, "attempt": number, "loss": 1 / step, "tokens": step * TOKENS_A_STEP}
        for number, first, last in attempts
        for step in range(first, last + 1)
    ]


EXPECTED = {step: 1 / step for step in range(1, 61)}


def test_every_record_of_a_step_must_be_right():
    found = made((1, 1, 35), (2, 21, 60))
    assert other_records(found, EXPECTED) == []
    found[30]["loss"] += 1e-15  # made again later, rightly
    assert other_records(found, EXPECTED) == ["1 losses differ, the first at step 31"]
    shifted = made((1, 1, 60))
    shifted[9]["tokens"] += 1
    assert other_records(shifted, EXPECTED) == ["1 token counts differ, the first at step 10"]
    assert other_records(made((1, 1, 59)), EXPECTED) == ["1 steps are missing, the first at step 60"]


def strike(kind: str, attempt: int, *, time: float = 0.0, begun: float | None = 5.0) -> Strike:
    return Strike(kind, time, time, 1, attempt, begun, begun, 9.0)


def test_an_interval_may_be_lost_by_each_fault_but_no_more():
    again = recomputed(made((1, 1, 35), (2, 21, 40), (4, 41, 50), (5, 41, 60)))
    assert again == {1: 0, 2: 15, 4: 0, 5: 10}
    assert too_much_again(again, [strike("rank killed", 1), strike("preempted", 2)], 20) == []
    assert too_much_again(again, [strike("rank killed", 1)], 20) == [
        "25 steps were made again after 1 fault(s) of attempt 1"
    ]
    assert too_much_again(again, [strike("network shaken", 1), strike("rank killed", 1)], 20) == []


def test_faults_that_did_not_strike_or_were_not_survived_are_named():
    planned = ["preempted", "preempted", "rank killed"]
    assert not_struck([strike(kind, 1) for kind in planned], planned) == []
    assert "1 of 3 faults" in not_struck([strike("preempted", 1), strike("rank killed", 1)], planned)[0]
    lost = strike("preempted", 1)
    lost.recovered = None
    assert not_struck([lost], ["preempted"]) == ["no recovery from preempted at step 1"]


@pytest.mark.parametrize(("state", "code", "tokens"), [("FAILED", 0, 1), ("COMPLETED", 75, 1), ("COMPLETED", 0, 2)])
def test_the_end_must_be_the_last_step(state: str, code: int, tokens: int):
    assert bad_end("COMPLETED", {"exit_code": 0, "tokens": TOKENS_A_STEP}, 1) == []
    assert len(bad_end(state, {"exit_code": code, "tokens": tokens * TOKENS_A_STEP}, 1)) == 1


def commit(run_dir: Path, step: int, token: int) -> Path:
    folder = run_dir / "checkpoints" / manifest.step_name(step)
    folder.mkdir(parents=True)
    content = manifest.manifest_content({})
    (folder / manifest.MANIFEST).write_bytes(content)
    sha = manifest.record_of(content).sha256
    sealed = manifest.commit_content(manifest.Commit(step, str(token), token, "2026-01-01T00:00:00Z", sha))
    (folder / manifest.COMMITTED).write_bytes(sealed)
    return folder


def test_commits_are_made_once_by_the_newest_attempt_and_stay_whole(tmp_path: Path):
    for step, token in ((20, 1), (40, 3), (60, 3)):
        commit(tmp_path, step, token)
    assert bad_commits(tmp_path, []) == []
    assert bad_commits(tmp_path, ["step-00000020"]) == ["committed twice: step-00000020"]
    last = commit(tmp_path, 80, 2)
    assert bad_commits(tmp_path, []) == ["step 80 was committed with token 2, step 60 before it with 3"]
    (last / manifest.MANIFEST).write_text("{}")
    assert "damaged checkpoints" in bad_commits(tmp_path, [])[0]


def test_the_table_tells_how_attempts_ended_after_each_fault(tmp_path: Path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts.jsonl").write_text(
        '{"from_step": -1, "time": 1}\n{"code": 75, "time": 12}\n{"code": 80, "time": 25}\n{"code": 0, "time": 90}\n'
    )
    strikes = [strike("preempted", 1, time=10.5), strike("rank killed", 2, time=20.5)]
    strikes += [strike("node powered off", 3, time=40.0), strike("network shaken", 4, time=60.0, begun=None)]
    found = ends(tmp_path, strikes)
    assert found["preempted"] == {"75": 1} and found["rank killed"] == {"80": 1}
    assert found["node powered off"] == {"–": 1} and found["network shaken"] == {}
