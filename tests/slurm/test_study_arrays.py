"""A study submitted to Slurm: arrays follow each other until every run has a result, whatever is preempted."""

import subprocess
from pathlib import Path

import pytest
from support.programs import command, run
from support.samples import REPOSITORY
from support.slurm import PACE, Cluster, reached
from support.studies import write_study
from support.tiny import TinyCorpus

from stablelm.study.results import read_results

pytestmark = pytest.mark.timeout(1200)
PATIENCE = 500


@pytest.mark.slow
def test_waves_follow_each_other_and_survive_preemption(slurm: Cluster, tiny_corpus: TinyCorpus, tmp_path: Path):
    small = {
        "grid": {"model.method": ["pre_ln", "deepnorm"], "depth": [2]},
        "lr": {"fixed": [4e-3, 1.6e-2]},
        "seeds": {"tune": [0], "confirm": [1]},
        "budget": {"tokens": 5120},
        "limits": {"jobs": 2},
    }
    for name in ("calm", "cluster"):
        (tmp_path / name).mkdir()
    calm = write_study(tmp_path / "calm", tiny_corpus, **small)
    file = write_study(tmp_path / "cluster", tiny_corpus, **small, dir=str(tmp_path / "cluster" / "runs"))
    assert run("study", "run", "--study", str(calm), cwd=calm.parent).returncode == 0

    options = ["--time=20", f"--output={tmp_path}/%A_%a.out"]
    paced = {"PYTHONPATH": f"{PACE}:{REPOSITORY}", "PACE_SECONDS": "0.2"}
    done = subprocess.run(
        command("study", "submit", "--study", str(file), "--", *options), cwd=REPOSITORY, env=slurm.environ | paced,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("submitted 4 runs as array ") and second.endswith(" submits what follows")
    array, follower = first.split()[-1], second.split()[1]

    folders = [Path(line) for line in (tmp_path / "cluster/runs/tiny-cpu-1.txt").read_text().split()]
    for task, folder in enumerate(folders[:2], 1):
        slurm.wait(lambda folder=folder: reached(folder.with_suffix(""), 3), f"{array}_{task}", PATIENCE)
        slurm.client("scontrol", "requeue", f"{array}_{task}")
    slurm.wait_done(follower, PATIENCE)
    said = (tmp_path / f"cluster/runs/next-{follower}.out").read_text()
    assert "submitted 2 runs as array" in said, said
    last = said.split("job ")[-1].split()[0]
    slurm.wait_done(last, PATIENCE)
    assert "nothing is open: every run has a result" in (tmp_path / f"cluster/runs/next-{last}.out").read_text()

    found, wanted = (read_results(tmp_path / name / "results") for name in ("cluster", "calm"))
    assert found.keys() == wanted.keys() and len(found) == 6
    for name, result in found.items():
        assert result["val_loss"] == wanted[name]["val_loss"] and result["curve"] == wanted[name]["curve"]
    assert sum(result["provenance"]["attempts"] == 2 for result in found.values()) == 2
