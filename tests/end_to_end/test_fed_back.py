"""A run's config.yaml holds what was asked: fed back it starts the same run anew, anywhere and on other ranks."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.programs import TINY, environment, losses, run, summary
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

from stablelm.checkpoint import manifest

DERIVED = {
    "model": ("kv_heads", "d_ff", "max_seq_len", "vocab_size", "stream", "placement", "norm", "init", "activation"),
    "train": ("steps", "micro_batch_size", "min_lr", "cooldown_steps", "precision"),
    "checkpoint": ("dir",),
}
LENGTH = 2 * 12 * 32  # tokens: two steps


def arguments(corpus: TinyCorpus, run_dir: Path, *extra: str) -> list[str]:
    short = [key for key in TINY if not key.startswith(("train.steps", "model.n_layers"))]
    return [*short, *corpus.overrides(), "model.n_layers=2", f"train.tokens={LENGTH}", f"run.dir={run_dir}", *extra]


@pytest.fixture(scope="module")
def first(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps."""
    run_dir = tmp_path_factory.mktemp("fed-back") / "first"
    done = run("pretrain", *arguments(tiny_corpus, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def section(run_dir: Path, file: str) -> dict:
    return yaml.safe_load((run_dir / file).read_text())


def test_derived_values_are_null_and_resolved_beside(first: Path):
    step = first / "checkpoints" / "step-00000002"
    asked, resolved = section(first, "config.yaml"), section(first, "resolved.yaml")
    assert section(step, "config.yaml") == asked
    for name, keys in DERIVED.items():
        for key in keys:
            assert asked[name][key] is None, f"{name}.{key}"
            assert resolved[name][key] is not None, f"{name}.{key}"
    assert (asked["train"]["tokens"], resolved["train"]["steps"]) == (LENGTH, 2)
    assert asked["run"]["dir"] == str(first)


def test_a_new_run_dir_starts_the_same_run_anew_on_any_ranks(first: Path, tmp_path: Path):
    before = sorted((first / "checkpoints").iterdir())
    for processes in (1, 2):
        anew = tmp_path / f"anew{processes}"
        done = run("pretrain", "--config", str(first / "config.yaml"), f"run.dir={anew}", processes=processes)
        assert done.returncode == 0, done.stderr
        assert "resumed" not in done.stdout
        assert losses(anew) == pytest.approx(losses(first), rel=1e-5)
        assert [path.name for path in (anew / "checkpoints").glob("step-*")] == ["step-00000002"]
        assert json.loads((anew / "identity.json").read_text()) == json.loads((first / "identity.json").read_text())
    assert losses(tmp_path / "anew1") == losses(first)
    assert sorted((first / "checkpoints").iterdir()) == before


def test_its_keys_can_be_changed_when_it_is_fed_back(first: Path, tmp_path: Path):
    changes = "model.method=deepscalelm_post deepscale.k=1 model.d_model=64 data.seq_len=48"
    changes += " train.tokens=null train.steps=1 train.global_batch_size=4 --print-config"
    done = run("pretrain", "--config", str(first / "config.yaml"), *changes.split(), f"run.dir={tmp_path}/other")
    assert done.returncode == 0, done.stderr
    told = yaml.safe_load(done.stdout)
    assert (told["model"]["stream"], told["model"]["placement"]) == ("scaled", "post")
    assert (told["model"]["d_ff"], told["model"]["max_seq_len"]) == (4 * 64, 48)
    assert (told["train"]["steps"], told["train"]["micro_batch_size"]) == (1, 4)


def test_a_checkpoint_moved_by_itself_is_evaluated(first: Path, tmp_path: Path, tiny_corpus: TinyCorpus):
    step = shutil.copytree(first / "checkpoints" / "step-00000002", tmp_path / "elsewhere" / "step-00000002")
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        done = run("eval", "--checkpoint", str(step), "--out", str(out), processes=processes)
        assert done.returncode == 0, done.stderr
        told = json.loads(out.read_text())["sets"]["default"]["loss"]
        assert told == pytest.approx(summary(first)["val_loss"]["default"], rel=1e-6)


def test_what_the_run_became_is_evaluated_not_what_its_keys_would_become(tiny_corpus: TinyCorpus, tmp_path: Path):
    """accelerate's flag is part of what was asked, and a launcher without it does not take it back."""
    done = run("pretrain", *arguments(tiny_corpus, tmp_path / "run"), ACCELERATE_MIXED_PRECISION="bf16")
    assert done.returncode == 0, done.stderr
    assert section(tmp_path / "run", "config.yaml")["train"]["precision"] == "bf16"
    out = tmp_path / "eval.json"
    assert run("eval", "--checkpoint", str(tmp_path / "run"), "--out", str(out)).returncode == 0
    logged = summary(tmp_path / "run")["val_loss"]["default"]
    assert json.loads(out.read_text())["sets"]["default"]["loss"] == pytest.approx(logged, rel=1e-6)


def test_shapes_that_were_solved_are_known_to_whoever_reads_the_checkpoint(tiny_corpus: TinyCorpus, tmp_path: Path):
    done = run("pretrain", *arguments(tiny_corpus, tmp_path / "run", "model.method=catformer"))
    assert done.returncode == 0, done.stderr
    assert section(tmp_path / "run", "config.yaml")["model"]["catformer"]["growth"] is None
    assert section(tmp_path / "run", "resolved.yaml")["model"]["catformer"]["growth"] > 0
    for program, words in (("checkpoints", ["verify"]), ("eval", ["--checkpoint"])):
        done = run(program, *words, str(tmp_path / "run"))
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_checkpoint_whose_config_holds_derived_values_is_evaluated_and_resumed(
    first: Path, tmp_path: Path, tiny_corpus: TinyCorpus
):
    """As earlier releases saved it: the resolved configuration under the same name."""
    old = tmp_path / "old"
    shutil.copytree(first, old)
    # Where it was may have a name that no new run can have.
    resolved = (old / "resolved.yaml").read_text().replace(f"dir: {first}", "dir: ${RUNS}")
    (old / "resolved.yaml").unlink()
    (old / "config.yaml").write_text(resolved)
    step = old / "checkpoints" / "step-00000002"
    resave(step, resolved)
    assert not manifest.verify(step)
    out = tmp_path / "eval.json"
    done = run("eval", "--checkpoint", str(old), "--out", str(out), processes=2)
    assert done.returncode == 0, done.stderr
    logged = summary(first)["val_loss"]["default"]
    assert json.loads(out.read_text())["sets"]["default"]["loss"] == pytest.approx(logged, rel=1e-6)
    done = run("pretrain", *arguments(tiny_corpus, old))
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout


def resave(step: Path, config_yaml: str) -> None:
    """Puts another config.yaml into a committed checkpoint, with the hashes that belong to it."""
    (step / "config.yaml").write_text(config_yaml)
    commit = manifest.read_commit(step)
    records = manifest.read_manifest(step, commit)
    content = manifest.manifest_content({**records, "config.yaml": manifest.record_of(config_yaml.encode())})
    (step / "manifest.json").write_bytes(content)
    commit = dataclasses.replace(commit, manifest_sha256=manifest.record_of(content).sha256)
    (step / "COMMITTED").write_bytes(manifest.commit_content(commit))


def test_checkpoints_of_another_run_are_not_taken_over(first: Path, tmp_path: Path):
    done = run(
        "pretrain", "--config", str(first / "config.yaml"), f"run.dir={tmp_path}/new",
        f"checkpoint.dir={first}/checkpoints",
    )  # fmt: skip
    assert done.returncode == 78
    assert f"checkpoint.dir={first}/checkpoints holds checkpoints of another run" in done.stderr
    assert not (tmp_path / "new").exists()


def test_odd_names_in_the_home_directory(tiny_corpus: TinyCorpus, tmp_path: Path):
    """`~` is the home directory in every path, kept as it was asked; the printed command can be pasted."""
    home = tmp_path / "home"
    home.mkdir()
    keys = arguments(tiny_corpus, Path("~/a run #1"), "checkpoint.dir=~/kept: here", "data.cache=~/cache")
    done = run("pretrain", *keys, cwd=tmp_path, HOME=str(home))
    assert done.returncode == 0, done.stderr
    run_dir = home / "a run #1"
    asked = section(run_dir, "config.yaml")
    assert (asked["run"]["dir"], asked["checkpoint"]["dir"]) == ("~/a run #1", "~/kept: here")
    assert section(run_dir, "resolved.yaml")["checkpoint"]["dir"] == str(home / "kept: here")
    assert (home / "kept: here" / "step-00000002").is_dir()
    assert not list(tmp_path.glob("~*"))
    own = ["--config", str(run_dir / "config.yaml")]  # for checkpoints outside the run directory
    printed = next(line for line in done.stdout.splitlines() if line.startswith("evaluate: "))
    assert shlex.split(printed)[1:] == ["python", "launch/eval.py", "--checkpoint", str(run_dir), *own]
    for program, words in (
        ("eval", ["--config", "~/a run #1/config.yaml", "--checkpoint"]),
        ("checkpoints", ["verify", "--dir", "~/kept: here"]),
    ):
        done = run(program, *words, "~/a run #1", cwd=tmp_path, HOME=str(home))
        assert done.returncode == 0, done.stderr
    anew = ["--config", "~/a run #1/config.yaml", "run.dir=~/b", "checkpoint.dir=null"]
    done = run("pretrain", *anew, cwd=tmp_path, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert losses(home / "b") == losses(run_dir)


def test_slurms_helper_reads_it(first: Path, tmp_path: Path):
    def helper(*words: str) -> str:
        command = [sys.executable, str(REPOSITORY / "slurm" / "attempt.py"), *words]
        return subprocess.check_output(command, text=True, env=environment(HOME=str(tmp_path))).strip()

    config, step = str(first / "config.yaml"), first / "checkpoints" / "step-00000002"
    assert helper("where", config) == str(first)
    assert helper("where", config, "run.dir=~/new #1") == f"{tmp_path}/new #1"
    assert helper("unevaluated", str(first)) == f"step-00000002 {step}"
