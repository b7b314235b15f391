"""What the job does about each exit code, on a real cluster with a program that only pretends to train."""

import json
import shutil
from pathlib import Path

import pytest
from support.samples import REPOSITORY
from support.slurm import Cluster

pytestmark = pytest.mark.timeout(300)

# Ends with the next of STUB_CODES in each attempt; + commits a step first, k dies without a word.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

run = Path(next(word for word in sys.argv if word.startswith("run.dir="))[8:])
provenance = run / "provenance.json"
begun = json.loads(provenance.read_text()) if provenance.exists() else []
attempt = len(begun) + 1
provenance.write_text(json.dumps([*begun, {"attempt": attempt}]))
word = os.environ["STUB_CODES"].split(",")[attempt - 1]
if "+" in word:
    (run / "checkpoints" / f"step-{attempt:08d}").mkdir(parents=True)
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
print("deadline", os.environ.get("SLURM_JOB_END_TIME"), "met at", os.environ["MASTER_ADDR"], flush=True)
while "STUB_WAIT" in os.environ and not stopped:
    time.sleep(0.1)
if "k" in word:
    os.kill(os.getpid(), signal.SIGKILL)
code = int(word.strip("+"))
(run / "summary.json").write_text(json.dumps({"exit_code": code, "reason": "as told", "attempts": attempt}))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def pretended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose launch/pretrain.py is the stub."""
    folder = tmp_path_factory.mktemp("pretended")
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm", ignore=shutil.ignore_patterns(".jobs", "site.sh"))
    shutil.copytree(REPOSITORY / "stablelm", folder / "stablelm")
    (folder / "launch").mkdir()
    (folder / "launch" / "pretrain.py").write_text(STUB)
    (folder / "slurm" / "site.sh").write_text("STABLELM_BACKOFF_SECONDS=25\necho the site file was read\n")
    (folder / "empty.yaml").write_text("{}\n")
    return folder


CASES = {
    # codes of the attempts: state, exit code, restarts, words in the comment
    "75+,80+,k+,0": ("COMPLETED", "0:0", "3", "finished"),
    "77+,0": ("COMPLETED", "0:0", "1", "finished"),
    "75,80,k": ("FAILED", "79:0", "2", "3 attempts in a row without a new commit"),
    "74": ("FAILED", "74:0", "0", "storage full or unwritable (74)"),
    "76": ("FAILED", "76:0", "0", "diverged (76)"),
    "78": ("FAILED", "78:0", "0", "bad configuration or input (78)"),
    "1": ("FAILED", "1:0", "0", "the program failed (1)"),
    "75+,75+,75+,75+": ("FAILED", "75:0", "3", "attempt 4 of at most 4"),
}


def test_every_exit_code_has_its_consequence(slurm: Cluster, pretended: Path, tmp_path: Path):
    jobs = {}
    for number, codes in enumerate(CASES):
        run_dir, log = tmp_path / f"run{number}", tmp_path / f"{number}.out"
        options = ["--ntasks=1", "--time=7", f"--output={log}"]
        variables = {"STUB_CODES": codes, "STABLELM_MAX_ATTEMPTS": "4"}
        script = str(pretended / "slurm" / "pretrain.sh")
        jobs[codes] = (
            slurm.submit(*options, script, "empty.yaml", f"run.dir={run_dir}", cwd=str(pretended), **variables),
            run_dir,
            log,
        )
    for codes, (job, run_dir, log) in jobs.items():
        told = slurm.wait_done(job, 150, log)
        state, code, restarts, words = CASES[codes]
        assert (told["JobState"], told["ExitCode"], told["Restarts"]) == (state, code, restarts), log.read_text()
        assert words in told["Comment"], codes
        assert "the site file was read\n" in log.read_text()
        assert "deadline 1" in log.read_text() and "met at node" in log.read_text()
        if "79" in code:
            assert json.loads((run_dir / "summary.json").read_text())["exit_code"] == 79
    lines = (jobs["77+,0"][1] / "slurm" / "attempts.jsonl").read_text().splitlines()
    ended, begun = (json.loads(line) for line in lines[1:3])
    assert begun["time"] - ended["time"] >= 24  # the back-off, without the nodes being held
    assert not list((pretended / "slurm" / ".jobs").iterdir())


def test_a_cancelled_job_is_not_requeued(slurm: Cluster, pretended: Path, tmp_path: Path):
    log = tmp_path / "job.out"
    job = slurm.submit(
        "--ntasks=1", "--time=7", f"--output={log}", str(pretended / "slurm" / "pretrain.sh"), "empty.yaml",
        f"run.dir={tmp_path}/run", cwd=str(pretended), STUB_CODES="75+", STUB_WAIT="1",
    )  # fmt: skip
    slurm.wait(lambda: log.exists() and "deadline" in log.read_text(), job, 60, log)
    slurm.client("scancel", job)
    assert slurm.wait_done(job, 60, log)["JobState"] == "CANCELLED"
    slurm.wait(lambda: "nothing to decide" in log.read_text(), job, 30, log)


def test_a_mistake_ends_the_job_before_anything_is_created(slurm: Cluster, pretended: Path, tmp_path: Path):
    log = tmp_path / "job.out"
    job = slurm.submit(
        "--ntasks=1", f"--output={log}", str(pretended / "slurm" / "pretrain.sh"), "empty.yaml",
        f"run.dir={tmp_path}/run", "modle.n_layers=3", cwd=str(pretended), STUB_CODES="0",
    )  # fmt: skip
    told = slurm.wait_done(job, 60, log)
    assert told["ExitCode"] == "78:0" and "(78)" in told["Comment"]
    assert "did you mean model.n_layers" in log.read_text()
    assert not (tmp_path / "run").exists()
