"""A run directory in which somebody planted links, or that is somebody else's: a run writes inside it or not at all."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile.checker import attempt
from hostile.checkpoints import SMALL, make_run, steps
from support.samples import REPOSITORY
from support.tiny import TinyCorpus

REPLACED = (
    "config.yaml", "resolved.yaml", "identity.json", "data_files.json", "provenance.json", "summary.json",
    "tokenizer.model", ".config.yaml.new", ".provenance.json.new", "heartbeat/rank-0.json", "stacks/rank-0.txt",
)  # fmt: skip
"""Names at which a link is replaced by the run's own file, or not touched."""
FOLDERS = (
    "checkpoints",
    "tensorboard",
    "wandb",
    "mlflow",
    "trackio",
    "heartbeat",
    "stacks",
    "profile",
    "checkpoints/fence",
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "outside" / "folder").mkdir(parents=True)
    (tmp_path / "outside" / "kept.txt").write_text("kept\n")
    (tmp_path / "run").mkdir()
    return tmp_path


def pretrain(place: Path, corpus: TinyCorpus, *keys: str, seconds: float = 60):
    own = [place / "run", place / "data", place / "kept"]
    line = [*SMALL, *corpus.overrides(), f"run.dir={place / 'run'}", "checkpoint.every=1", *keys]
    return attempt("pretrain", *line, watched=place, own=own, cwd=place, seconds=seconds)


def linked(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def test_links_to_files_are_replaced_and_not_followed(tiny_corpus: TinyCorpus, place: Path):
    for name in REPLACED:
        linked(place / "run" / name, place / "outside" / "kept.txt")
    outcome = pretrain(place, tiny_corpus)
    assert outcome.faults({0}) == []
    for name in REPLACED[:7]:
        assert (place / "run" / name).is_file() and not (place / "run" / name).is_symlink(), name
    assert json.loads((place / "run" / "summary.json").read_text())["exit_code"] == 0


def test_nothing_is_made_at_the_end_of_dangling_links(tiny_corpus: TinyCorpus, place: Path):
    for name in REPLACED:
        linked(place / "run" / name, place / "outside" / "made")
    assert pretrain(place, tiny_corpus).faults({0}) == []


@pytest.mark.parametrize("name", FOLDERS)
def test_a_link_in_place_of_a_folder_is_refused(name: str, tiny_corpus: TinyCorpus, place: Path):
    linked(place / "run" / name, place / "outside" / "folder")
    outcome = pretrain(place, tiny_corpus, seconds=20)
    assert outcome.faults({78}) == []
    assert f"{place / 'run' / name} is a link to" in outcome.err
    assert sorted(path.name for path in (place / "run").iterdir()) == [name.partition("/")[0]]


@pytest.mark.parametrize("kind", ["link", "fifo", "device", "folder"])
def test_records_go_to_a_regular_file_or_nowhere(kind: str, tiny_corpus: TinyCorpus, place: Path):
    path = place / "run" / "metrics.jsonl"
    make: dict[str, Callable[[], object]] = {
        "link": lambda: path.symlink_to(place / "outside" / "kept.txt"),
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/null"),
        "folder": path.mkdir,
    }
    make[kind]()
    outcome = pretrain(place, tiny_corpus, seconds=20)
    assert outcome.faults({78}) == []
    assert "metrics.jsonl is not a regular file" in outcome.err


def test_a_linked_checkpoints_folder_is_used_when_the_user_names_it(tiny_corpus: TinyCorpus, place: Path):
    (place / "kept").mkdir()
    linked(place / "run" / "checkpoints", place / "kept")
    refused = pretrain(place, tiny_corpus, seconds=20)
    assert refused.faults({78}) == []
    assert f"set checkpoint.dir={place / 'kept'}" in refused.err
    assert pretrain(place, tiny_corpus, f"checkpoint.dir={place / 'kept'}").faults({0}) == []
    assert sorted(path.name for path in (place / "kept").glob("step-*")) == ["step-00000001", "step-00000002"]


def test_the_run_directory_and_its_parents_may_be_links(tiny_corpus: TinyCorpus, place: Path):
    (place / "real").mkdir()
    (place / "run").rmdir()
    linked(place / "run", place / "real")
    line = [*SMALL, *tiny_corpus.overrides(), f"run.dir={place / 'run'}"]
    outcome = attempt("pretrain", *line, watched=place, own=[place / "real", place / "data"], cwd=place, seconds=60)
    assert outcome.faults({0}) == []


def foreign_directory(place: Path) -> Path:
    """A directory of another user; run as another user than root, one of root's."""
    if os.geteuid() != 0:
        return Path("/usr/lib")
    os.chown(place / "run", 12345, 12345)
    return place / "run"


def test_a_directory_of_another_user_is_refused_unless_it_is_allowed(tiny_corpus: TinyCorpus, place: Path):
    run_dir = foreign_directory(place)
    refused = pretrain(place, tiny_corpus, f"run.dir={run_dir}", seconds=20)
    assert refused.faults({78}) == []
    assert f"run.dir={run_dir} belongs to another user" in refused.err
    assert "run.allow_foreign_dir=true" in refused.err
    if run_dir == place / "run":
        assert not list(run_dir.iterdir())
        allowed = pretrain(place, tiny_corpus, f"run.dir={run_dir}", "run.allow_foreign_dir=true")
        assert allowed.faults({0}) == []


def test_a_linked_step_is_left_alone_by_training_and_prune(tiny_corpus: TinyCorpus, place: Path):
    line = [*SMALL, *tiny_corpus.overrides(), f"run.dir={place / 'run'}", "checkpoint.every=1", "checkpoint.keep=5"]
    line += ["train.schedule=constant"]
    assert attempt("pretrain", *line, watched=place / "outside", cwd=place, seconds=60).faults({0}) == []
    archived = steps(place / "run")[0]
    shutil.move(archived, place / "outside" / archived.name)
    archived.symlink_to(place / "outside" / archived.name)
    outcome = pretrain(place, tiny_corpus, "train.steps=4", "train.schedule=constant", "checkpoint.keep=1")
    assert outcome.faults({0}) == []
    assert [path.name for path in steps(place / "run")] == ["step-00000001", "step-00000004"]
    assert archived.is_symlink()
    assert outcome.err.count(f"{archived} is a link and is left alone") == 1
    outcome = attempt("checkpoints", "prune", str(place / "run"), "--keep", "1", watched=place, cwd=place)
    assert outcome.faults({0}) == []
    assert f"{archived} is a link and is left alone" in outcome.err
    assert "left alone" not in outcome.out


def test_prune_stays_inside_what_it_was_given(tiny_corpus: TinyCorpus, place: Path):
    other = make_run(place / "outside", tiny_corpus)
    shutil.rmtree(place / "run")
    run = make_run(place, tiny_corpus, f"checkpoint.dir={other / 'checkpoints'}", "checkpoint.keep=1")
    inside = run / "checkpoints"
    shutil.move(inside, place / "elsewhere")
    for line in (["prune"], ["prune", "--keep", "1"], ["list"], ["verify"], ["consolidate", "--out", "w.safetensors"]):
        outcome = attempt("checkpoints", line[0], str(run), *line[1:], watched=place, cwd=place)
        assert outcome.faults({78} if line[0] != "prune" else {0, 78}) == [], line
        assert len(steps(other)) == 2
        if line[0] != "prune":
            assert "says checkpoint.dir=" in outcome.err
    inside.symlink_to(other / "checkpoints")
    assert attempt("checkpoints", "prune", str(run), "--keep", "1", watched=place, cwd=place).faults({0, 78}) == []
    named = ["prune", str(run), "--dir", str(place / "elsewhere")]
    refused = attempt("checkpoints", *named, watched=place, cwd=place)
    assert refused.faults({78}) == []
    assert "give --keep N" in refused.err
    own = [place / "elsewhere"]
    assert attempt("checkpoints", *named, "--keep", "1", watched=place, own=own, cwd=place).faults({0}) == []
    assert [path.name for path in (place / "elsewhere").glob("step-*")] == ["step-00000002"]


def test_a_job_looks_for_checkpoints_outside_for_the_users_own_run_alone(tiny_corpus: TinyCorpus, place: Path):
    """`slurm/evaluate.sh` asks for them with --own where `slurm/pretrain.sh` started the run."""
    other = make_run(place / "outside", tiny_corpus)
    (place / "run" / "config.yaml").write_text(f"checkpoint: {{dir: {other / 'checkpoints'}}}\n")
    helper, line = str(REPOSITORY / "slurm" / "attempt.py"), ["unevaluated", str(place / "run")]
    everything = [f"{path.name} {path}" for path in steps(other)]
    for words, found in ([], [""]), (["--own"], everything):
        outcome = attempt(helper, *line, *words, watched=place, cwd=place)
        assert outcome.faults({0}) == []
        assert outcome.out.split("\n")[:-1] == found
