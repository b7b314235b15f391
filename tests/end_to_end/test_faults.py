"""Each of `faults.*`: its guard acts, the run ends as it should, and what is left goes on as if nothing had been."""

import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from support.forked import start_forked
from support.httpserver import serve
from support.programs import LAUNCH, TINY, environment, free_port, losses, run, summary
from support.tiny import TinyCorpus, make_tiny_corpus

from stablelm.checkpoint.manifest import verify
from stablelm.checkpoint.saved_run import read_state
from stablelm.checkpoint.selection import newest_valid
from stablelm.observe.sinks import read_metrics

pytestmark = pytest.mark.slow
ALLOW = "faults.allow=true"
SPIKES = ("guards.window=4", "guards.threshold=8", "guards.skip_data=2", "checkpoint.every=4", "train.lr=1e-5")


def start(corpus: TinyCorpus, run_dir: Path, *extra: str, processes: int = 1, launcher: str = ""):
    line = [*TINY, *corpus.overrides(), f"run.dir={run_dir}", "evaluate.batches=1", *extra]
    return run("pretrain", *line, processes=processes, launcher=launcher)


def state(run_dir: Path) -> dict:
    found = newest_valid(run_dir / "checkpoints", on_damaged=lambda path, why: None)
    assert found is not None
    return read_state(found)


def test_faults_are_refused_unless_allowed(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = start(tiny_corpus, tmp_path / "run", "faults.bad_batch=3", "faults.spike=2")
    assert done.returncode == 78
    assert "faults.bad_batch, faults.spike would break the run on purpose" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_batch_is_skipped_and_counted(processes: int, tiny_corpus: TinyCorpus, tmp_path: Path):
    bad = (ALLOW, "faults.bad_batch=3", "checkpoint.every=4")
    whole = start(tiny_corpus, tmp_path / "whole", *bad, "train.steps=8", processes=processes)
    assert whole.returncode == 0, whole.stderr
    found = losses(tmp_path / "whole")
    assert [step for step, loss in found.items() if math.isnan(loss)] == [3]
    told = summary(tmp_path / "whole")
    assert (told["skipped_steps"], told["step"]) == (1, 8)
    assert "step 3: update skipped (loss nan" in whole.stdout
    assert state(tmp_path / "whole")["guards"]["skipped_steps"] == 1
    # An attempt that ends and one that goes on make the same run.
    parts = (*bad, "train.steps=8", "guards.recheck=true")
    first = start(tiny_corpus, tmp_path / "parts", *parts, "run.stop_after=5", processes=processes)
    assert first.returncode == 75, first.stderr
    assert "step 3: run again, it is the same in every bit" in first.stdout
    assert first.stdout.count("run again, it") == 1
    assert start(tiny_corpus, tmp_path / "parts", *parts, processes=processes).returncode == 0
    again = losses(tmp_path / "parts")
    assert [again[step] for step in (1, 2, 4, 5, 6, 7, 8)] == [found[step] for step in (1, 2, 4, 5, 6, 7, 8)]
    assert summary(tmp_path / "parts")["skipped_steps"] == 1


def test_too_many_in_a_row_end_with_76(tiny_corpus: TinyCorpus, tmp_path: Path):
    # A rate at which the weights themselves become too large for finite logits.
    wild = ("train.lr=1e30", "train.warmup_steps=0", "guards.max_skips=3", "checkpoint.every=2")
    done = start(tiny_corpus, tmp_path, *wild, processes=2)
    assert done.returncode == 76, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("updates in a row were skipped") == 1
    assert summary(tmp_path)["exit_code"] == 76


def test_a_spike_of_the_norm_is_left_out(tiny_corpus: TinyCorpus, tmp_path: Path):
    spike = (ALLOW, "faults.bad_batch=9", "faults.spike=50", "guards.spike=skip", *SPIKES, "train.steps=12")
    done = start(tiny_corpus, tmp_path, *spike)
    assert done.returncode == 0, done.stderr
    assert "step 9: update skipped (loss" in done.stdout
    told = summary(tmp_path)
    assert (told["skipped_steps"], told["spikes"], told["rewinds"]) == (1, 1, 0)


def test_a_spike_rewinds_and_a_resumed_run_repeats_it(tiny_corpus: TinyCorpus, tmp_path: Path):
    spike = (ALLOW, "faults.bad_batch=10", "faults.spike=50", "guards.spike=rewind", *SPIKES, "train.steps=14")
    whole = start(tiny_corpus, tmp_path / "whole", *spike, processes=2)
    assert whole.returncode == 0, whole.stderr
    assert "rewind 1 of 3: back to step 8; batches 9 to 10 are skipped" in whole.stdout
    told = summary(tmp_path / "whole")
    assert (told["rewinds"], told["step"], told["skipped_steps"]) == (1, 14, 0)
    saved = state(tmp_path / "whole")
    assert (saved["data"]["data_step"], saved["guards"]["jumps"]) == (16, [[8, 2]])
    steps = [record["step"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "lr" in record]
    assert steps.count(9) == steps.count(10) == 2
    # Stopped in between: before the spike, at it, after the rewind.
    for stop in ("9", "10", "12", "99"):
        done = start(tiny_corpus, tmp_path / "parts", *spike, f"run.stop_after={stop}", processes=2)
        assert done.returncode in (0, 75), done.stderr
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert state(tmp_path / "parts")["guards"] == saved["guards"]


def test_rewinds_are_used_up_with_76(tiny_corpus: TinyCorpus, tmp_path: Path):
    spike = (ALLOW, "faults.bad_batch=10", "faults.spike=50", "guards.spike=rewind", "guards.max_rewinds=0", *SPIKES)
    done = start(tiny_corpus, tmp_path, *spike)
    assert done.returncode == 76, done.stderr
    assert "a spike at step 10" in done.stderr
    assert state(tmp_path)["step"] == 8


@pytest.mark.parametrize(
    ("rank", "phase", "launcher"),
    # Step: the other rank waits in a collective. A first read is waited for, so that a hang in data is found later.
    [(0, "step", ""), (1, "step", ""), (1, "step", "torchrun"), (1, "data", ""), (0, "save", ""), (1, "save", "")],
)
def test_a_hung_rank_is_named_once_and_the_job_ends(
    rank: int, phase: str, launcher: str, tiny_corpus: TinyCorpus, tmp_path: Path
):
    hang = (ALLOW, f"faults.hang=[{rank},6]", f"faults.hang_in={phase}", "observe.hang_seconds=4", "checkpoint.every=2")
    hang += ("train.steps=8",)
    began = time.monotonic()
    done = start(tiny_corpus, tmp_path, *hang, processes=2, launcher=launcher)
    assert time.monotonic() - began < 120
    assert done.returncode == (1 if launcher else 80), done.stderr
    assert done.stderr.count("is stuck") == 1
    told = summary(tmp_path)
    assert told["exit_code"] == 80
    assert f"rank {rank} on " in told["reason"]
    finished = {"data": "step 5, record", "step": "step 6, data", "save": r"step (6, record|4, save)"}[phase]
    assert re.search(rf"is stuck: step 6, {phase} for \d+ s, last finished {finished}", told["reason"]), told["reason"]
    for each in (0, 1):
        assert "Thread 0x" in (tmp_path / "stacks" / f"rank-{each}.txt").read_text()
        assert json.loads((tmp_path / "heartbeat" / f"rank-{each}.json").read_text())["rank"] == each
    assert "faults.py" in (tmp_path / "stacks" / f"rank-{rank}.txt").read_text()
    # The next attempt goes on where the last commit stands.
    again = start(tiny_corpus, tmp_path, *hang, processes=2)
    assert again.returncode == 0, again.stderr
    assert "step-00000004" in next(line for line in again.stdout.splitlines() if "resumed from" in line)
    assert state(tmp_path)["step"] == 8


@pytest.mark.parametrize("launcher", ["", "torchrun"])
def test_a_crash_ends_all_with_one_traceback(launcher: str, tiny_corpus: TinyCorpus, tmp_path: Path):
    began = time.monotonic()
    crash = (ALLOW, "faults.crash=[1,3]", "checkpoint.every=2", "train.steps=4")
    done = start(tiny_corpus, tmp_path, *crash, processes=2, launcher=launcher)
    assert time.monotonic() - began < 120
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError: faults.crash=[1, 3]") == 1
    assert done.stderr.count("Traceback") == 1 or launcher  # torchrun adds its own
    told = summary(tmp_path)
    assert (told["exit_code"], told["reason"]) == (1, "RuntimeError: faults.crash=[1, 3]")
    assert start(tiny_corpus, tmp_path, *crash, processes=2).returncode == 0
    assert summary(tmp_path)["step"] == 4


def test_a_slow_rank_is_named(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = start(tiny_corpus, tmp_path, ALLOW, "faults.slow=[1,0.3]", "train.steps=4", processes=2)
    assert done.returncode == 0, done.stderr
    named = [record for record in read_metrics(tmp_path / "metrics.jsonl") if "lr" in record]
    assert [record.get("slowest_rank") for record in named[1:]] == [1, 1, 1]
    assert all(record["slowest_rank_seconds"] >= 0.3 for record in named[1:])
    assert "slowest rank 1 on " in done.stdout
    assert state(tmp_path)["step"] == 4


def test_a_corrupt_save_is_not_resumed_from(tiny_corpus: TinyCorpus, tmp_path: Path):
    corrupt = (ALLOW, "faults.corrupt_save=4", "checkpoint.every=2", "train.steps=6")
    first = start(tiny_corpus, tmp_path, *corrupt, "run.stop_after=4")
    assert first.returncode == 75, first.stderr
    assert verify(tmp_path / "checkpoints" / "step-00000004")
    again = start(tiny_corpus, tmp_path, *corrupt)
    assert again.returncode == 0, again.stderr
    assert "is damaged" in again.stdout
    assert "step-00000002" in again.stdout
    assert not verify(tmp_path / "checkpoints" / "step-00000004")
    assert state(tmp_path)["step"] == 6


def test_a_full_disk_ends_with_74_and_keeps_the_last_commit(tiny_corpus: TinyCorpus, tmp_path: Path):
    full = (ALLOW, "faults.full_disk=4", "checkpoint.every=2", "train.steps=6")
    done = start(tiny_corpus, tmp_path, *full, processes=2)
    assert done.returncode == 74, done.stderr
    assert done.stderr.count("no space for a checkpoint") == 1
    assert summary(tmp_path)["exit_code"] == 74
    assert state(tmp_path)["step"] == 2
    assert start(tiny_corpus, tmp_path, *full, processes=2).returncode == 0


@pytest.mark.parametrize(
    ("number", "rank"),
    [(signal.SIGKILL, 1), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)],
    ids=["1-dies", "0-stops", "1-stops"],
)
def test_a_silent_rank_is_named_by_the_others(
    number: signal.Signals, rank: int, tiny_corpus: TinyCorpus, tmp_path: Path
):
    """Without a launcher that would end them, as under srun; and the store is rank 0's, not torchrun's."""
    hang, port, run_dir = 6, str(free_port()), tmp_path / "run"
    endless = ("train.steps=100000", "train.schedule=constant", f"observe.hang_seconds={hang}", f"run.dir={run_dir}")
    line = [*TINY, *tiny_corpus.overrides(), *endless]
    outputs = [tmp_path / str(own) for own in range(3)]
    ranks = []
    for own, output in enumerate(outputs):
        output.mkdir()
        variables = {"RANK": str(own), "LOCAL_RANK": str(own), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        environ = environment(**variables, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        ranks.append(start_forked(str(LAUNCH / "pretrain.py"), line, environ, output=output))
    others = [process for own, process in enumerate(ranks) if own != rank]
    try:
        wait_for_records(run_dir, 3)
        if number == signal.SIGSTOP:  # for shorter than a hang, but for longer than its store may take
            os.kill(ranks[rank].pid, signal.SIGSTOP)
            time.sleep(4)
            os.kill(ranks[rank].pid, signal.SIGCONT)
            wait_for_records(run_dir, len((run_dir / "metrics.jsonl").read_text().splitlines()) + 100)
        os.kill(ranks[rank].pid, number)
        silent = time.monotonic()
        for process in others:
            process.join(timeout=60)
        assert time.monotonic() - silent < hang + 15
        assert [process.exitcode for process in others] == [80, 80]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    told = [(output / "err").read_text() for output in outputs]
    assert sum(text.count("error: ") for text in told) == 1, told
    reason = summary(run_dir)["reason"]
    assert reason.startswith(f"rank {rank} on ")
    assert "does not answer" in reason
    assert all((run_dir / "stacks" / f"rank-{own}.txt").exists() for own in range(3) if own != rank)


def wait_for_records(run_dir: Path, count: int) -> None:
    deadline, path = time.monotonic() + 120, run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_store_that_is_away_for_longer_than_a_hang_is_waited_for(tmp_path: Path):
    run_dir, told = tmp_path / "run", {}
    corpus = make_tiny_corpus(tmp_path / "corpus", documents=8)
    with serve(tmp_path / "corpus" / "train") as server:

        def outage() -> None:
            """Until a heartbeat has told of it and three times what counts as a hang has passed."""
            wait_for_records(run_dir, 3)
            server.down, began = True, time.monotonic()
            while time.monotonic() - began < (9 if told else 60):
                time.sleep(0.2)
                notes = [json.loads(path.read_text()) for path in (run_dir / "heartbeat").glob("rank-*.json")]
                told.update(next((note for note in notes if "store" in note), {}))
            server.down = False

        names = sorted(path.name for path in (tmp_path / "corpus" / "train").iterdir())
        path = f"data.path=[{','.join(f'{server.url}/{name}' for name in names)}]"
        endless = ("train.steps=60", "observe.hang_seconds=3", "data.prefetch=1")
        outside = threading.Thread(target=outage)
        outside.start()
        done = start(corpus, run_dir, path, *endless, processes=2)
        outside.join()
    assert done.returncode == 0, done.stderr
    assert told["phase"] == "data"
    assert told["store"]["file"].startswith(server.url)
    assert told["store"]["attempt"] > 1
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "lr" in record]
    assert max(record["store_wait_seconds"] for record in records) > 5
