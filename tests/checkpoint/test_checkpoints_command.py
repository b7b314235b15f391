import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.saved import assert_equal, flip_bit, save_small, save_toy, toy_tensors

from stablelm.checkpoint.reader import consolidate
from stablelm.errors import CheckpointError, ConfigError

COMMAND = Path(__file__).resolve().parents[2] / "launch" / "checkpoints.py"


def call(*arguments):
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, arguments)], capture_output=True, text=True, check=False, cwd="/"
    )


@pytest.fixture
def run(tmp_path):
    for step in (1, 2, 3):
        save_toy(tmp_path / "checkpoints", step)
    return tmp_path


def test_help_is_quick():
    started = time.perf_counter()
    assert call("--help").returncode == 0
    assert time.perf_counter() - started < 0.5


def test_list_and_verify_show_what_is_damaged(tmp_path):
    run = tmp_path
    for step in (1, 2, 3):
        save_small(run / "checkpoints", step)
    shown = call("list", run)
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()[1:]] == [f"step-0000000{i}" for i in (3, 2, 1)]
    assert shown.stdout.splitlines()[1].endswith("a1")
    checked = call("verify", run / "checkpoints")
    assert (checked.returncode, checked.stderr) == (0, "")
    flip_bit(run / "checkpoints" / "step-00000002" / "state.json", 17)
    checked = call("verify", run)
    assert checked.returncode == 78
    assert "step-00000002    corrupt: state.json was changed" in checked.stdout
    assert checked.stderr.count("\n") == 1
    assert "step-00000002" in checked.stderr
    assert call("verify", run / "checkpoints" / "step-00000001").returncode == 0


def test_prune_follows_the_run_and_its_arguments(run):
    refused = call("prune", run)
    assert refused.returncode == 78
    assert "give --keep N" in refused.stderr
    (run / "config.yaml").write_text("checkpoint:\n  keep: 2\n  keep_permanent_every: null\n")
    assert "would delete" in call("prune", run, "--dry-run").stdout
    (run / "checkpoints" / ".staging-00000004-x").mkdir()
    assert call("prune", run).stdout == f"deleted {run / 'checkpoints' / 'step-00000001'}\n"
    assert call("prune", run, "--keep", "1", "--keep-permanent-every", "2").stdout == ""
    assert ".staging-00000004-x" in call("prune", run, "--keep", "1", "--unfinished").stdout
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert call("prune", run, "--keep", "0").returncode == 78


def test_weights_are_consolidated_into_one_safetensors_file(run):
    from safetensors import safe_open

    out = run / "weights.safetensors"
    assert consolidate(str(run), out).startswith(f"{out}: 4 tensors, 0.00 M elements of {run}")
    wanted = {k.removeprefix("model."): v for k, v in toy_tensors(3).items() if k.startswith("model.")}
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        assert_equal({name: file.get_tensor(name) for name in file.keys()}, wanted)  # noqa: SIM118
    with pytest.raises(ConfigError, match="exists already; name a new file"):
        consolidate(str(run), out)
    damaged = run / "checkpoints" / "step-00000001"
    flip_bit(damaged / "tensors" / "rank-00000-0.safetensors", 5)
    with pytest.raises(CheckpointError, match="is damaged"):
        consolidate(str(damaged), run / "other")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "weights.safetensors"]


def test_a_place_without_checkpoints_is_one_sentence(tmp_path):
    for command in ("list", "verify"):
        answer = call(command, tmp_path / "absent")
        assert answer.returncode == 78
        assert answer.stderr == (
            f"{tmp_path / 'absent'} is not a directory: name a run, its checkpoints or one step-... directory in it\n"
        )
        assert "holds no checkpoint" in call(command, tmp_path).stderr
