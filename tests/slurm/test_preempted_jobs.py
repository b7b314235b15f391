"""Runs by `sbatch slurm/pretrain.sh` that are cut short in every way finish with the losses of an undisturbed run."""

import json
import subprocess
from functools import cache
from pathlib import Path

import pytest
from support import programs
from support.programs import TINY, losses, summary
from support.samples import REPOSITORY
from support.slurm import PACE, Cluster, reached
from support.tiny import TinyCorpus

pytestmark = pytest.mark.timeout(1200)
PACED = {"PYTHONPATH": str(PACE), "PACE_SECONDS": "0.1"}
PATIENCE = 400


def settings(corpus: TinyCorpus, *more: str) -> list[str]:
    return [*TINY, *corpus.overrides(), "train.steps=60", "checkpoint.every=20", *more]


@pytest.fixture(scope="session")
def undisturbed(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory):
    """Losses of the same run without Slurm, pacing or interruption, by engine and number of processes."""

    @cache
    def made(kind: str, processes: int) -> dict[int, float]:
        run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
        arguments = settings(tiny_corpus, f"engine.kind={kind}", f"run.dir={run_dir}")
        done = programs.run("pretrain", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
        return losses(run_dir)

    return made


def submit(slurm: Cluster, folder: Path, options: list[str], *arguments: str, **extra: str) -> tuple[str, Path]:
    """Job id and log; two nodes with two tasks each unless `options` say otherwise."""
    log = folder / "job.out"
    config = folder / "empty.yaml"
    config.write_text("{}\n")
    shape = ["-N2", "--ntasks-per-node=2", "--time=20", f"--output={log}", *options]
    return slurm.submit(*shape, "slurm/pretrain.sh", str(config), *arguments, **PACED | extra), log


def attempts(run_dir: Path) -> list[dict]:
    lines = (run_dir / "slurm" / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_run_survives_preemption_and_a_dead_node(slurm: Cluster, tiny_corpus, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    job, log = submit(slurm, tmp_path, [], *settings(tiny_corpus, "engine.kind=ddp", f"run.dir={run_dir}"))
    after = slurm.submit(f"--dependency=afterok:{job}", "--output=/dev/null", f"--wrap=touch {tmp_path}/after")

    slurm.wait(lambda: reached(run_dir, 5), job, PATIENCE, log)
    (tmp_path / "empty.yaml").write_text("train: {steps: 1}\n")  # the job keeps to what it began with
    slurm.client("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(lambda: reached(run_dir, 25, attempt=2), job, PATIENCE, log)
    stopped = next(line for line in attempts(run_dir) if "code" in line)
    assert stopped["code"] == 75 and stopped["step"] >= 5
    assert slurm.about(after)["JobState"] == "PENDING"

    node = slurm.about(job)["BatchHost"]
    slurm.control("kill-node", node)
    slurm.client("scontrol", "update", f"nodename={node}", "state=down", "reason=power")
    told = slurm.wait_done(job, PATIENCE, log)
    slurm.control("start-node", node)
    slurm.client("scontrol", "update", f"nodename={node}", "state=resume")

    assert (told["JobState"], told["Restarts"], told["Comment"]) == ("COMPLETED", "2", "finished"), log.read_text()
    assert losses(run_dir) == undisturbed("ddp", 4)
    begun = [line["from_step"] for line in attempts(run_dir) if "from_step" in line]
    assert begun == [-1, stopped["step"], 20]
    assert "ended without a summary" in log.read_text()
    slurm.wait_done(after, 60)
    assert (tmp_path / "after").exists()


@pytest.mark.slow
def test_torchrun_in_the_job_and_the_time_limit(slurm: Cluster, tiny_corpus, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    arguments = settings(tiny_corpus, "engine.kind=ddp", f"run.dir={run_dir}")
    job, log = submit(slurm, tmp_path, [], *arguments, STABLELM_LAUNCHER="torchrun", PACE_SECONDS="1")
    slurm.wait(lambda: reached(run_dir, 3), job, PATIENCE, log)
    # Slurm looks at time limits twice a minute; USR1 comes when less than --signal's 60 s and 30 more are left.
    slurm.client("scontrol", "update", f"JobId={job}", "EndTime=now+80")
    slurm.wait(lambda: slurm.about(job).get("Restarts") == "1", job, PATIENCE, log)
    stopped = next(line for line in attempts(run_dir) if "code" in line)
    assert stopped["code"] == 75 and stopped["step"] >= 3
    told = slurm.wait_done(job, PATIENCE, log)
    assert told["JobState"] == "COMPLETED", log.read_text()
    assert losses(run_dir) == undisturbed("ddp", 4)


@pytest.mark.slow
def test_accelerate_in_the_job_and_a_signal_to_its_tasks(slurm: Cluster, tiny_corpus, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    flags = tmp_path / "flags.yaml"
    flags.write_text((REPOSITORY / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    job, log = submit(
        slurm, tmp_path, [], *settings(tiny_corpus, f"run.dir={run_dir}"), STABLELM_LAUNCHER="accelerate",
        STABLELM_ACCELERATE=f"--config_file={flags}",
    )  # fmt: skip
    slurm.wait(lambda: reached(run_dir, 5), job, PATIENCE, log)
    flags.unlink()  # the job has its own copy
    slurm.client("scancel", "--signal=TERM", job)
    told = slurm.wait_done(job, PATIENCE, log)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert attempts(run_dir)[1]["code"] == 75
    assert losses(run_dir) == undisturbed("fsdp2", 4)


@pytest.mark.slow
def test_an_array_of_four_runs_two_at_a_time(slurm: Cluster, tiny_corpus, undisturbed, tmp_path):
    config = tmp_path / "empty.yaml"
    config.write_text("{}\n")
    lines = [
        " ".join([str(config), *settings(tiny_corpus, f"run.dir={tmp_path}/run{number}")]) for number in range(5)
    ]  # fmt: skip
    (tmp_path / "run0").mkdir()
    (tmp_path / "run0" / "summary.json").write_text('{"exit_code": 0}')
    study = tmp_path / "runs.txt"
    study.write_text("\n".join(["# one finished run and four new ones", *lines]) + "\n")
    options = ["--ntasks=1", "--time=20", f"--output={tmp_path}/%A_%a.out"]
    environ = slurm.environ | PACED | {"STABLELM_AT_ONCE": "2"}
    array = subprocess.run(
        ["slurm/study.sh", str(study), *options], cwd=REPOSITORY, env=environ, capture_output=True,
        text=True, check=True,
    ).stdout.strip()  # fmt: skip
    study.write_text("changed after the array was submitted\n")

    for task in (3, 4):
        run_dir = tmp_path / f"run{task - 2}"
        slurm.wait(lambda run_dir=run_dir: reached(run_dir, 5), f"{array}_{task}", PATIENCE)
        # As preemption does it: TERM to the tasks, the end a little later, and back to the queue.
        slurm.client("scontrol", "requeue", f"{array}_{task}")
    for task in (3, 4, 5, 6):
        log = tmp_path / f"{array}_{task}.out"
        told = slurm.wait_done(f"{array}_{task}", PATIENCE, log)
        assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1" if task < 5 else "0"), log.read_text()
        assert losses(tmp_path / f"run{task - 2}") == undisturbed("single", 1)
    assert not (tmp_path / "run0" / "metrics.jsonl").exists()
    assert told["ArrayTaskThrottle"] == "2"


@pytest.mark.slow
def test_an_evaluation_job_follows_the_run(slurm: Cluster, tiny_corpus, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "evaluate.out"
    options = ["--ntasks=1", f"--output={log}"]
    follow = slurm.submit(*options, "slurm/evaluate.sh", str(run_dir), STABLELM_LOOK_SECONDS="1")
    arguments = settings(tiny_corpus, "train.steps=40", "checkpoint.keep=9", f"run.dir={run_dir}")
    submit(slurm, tmp_path, ["-N1", "--ntasks-per-node=1"], *arguments)
    told = slurm.wait_done(follow, PATIENCE, log)
    assert told["JobState"] == "COMPLETED", log.read_text()
    found = [json.loads(path.read_text()) for path in sorted((run_dir / "evaluations").iterdir())]
    assert [one["step"] for one in found] == [20, 40]
    last = summary(run_dir)["val_loss"]["default"]
    assert found[-1]["sets"]["default"]["loss"] == pytest.approx(last, rel=1e-6)
    assert "the run has finished; 0 checkpoint(s) could not be evaluated" in log.read_text()
