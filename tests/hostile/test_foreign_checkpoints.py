"""What a checkpoint of somebody else may make our programs do: nothing but read it."""

import os
import random
import shutil
from pathlib import Path

import pytest
from hostile.checker import attempt
from hostile.checkpoints import FOREIGN, HARMS, Harm, identity_without, make_run, random_damage, set_keys
from support.tiny import TinyCorpus

from stablelm.config.keys import keys

READERS = (["eval", "--checkpoint"], ["checkpoints", "list"], ["checkpoints", "verify"])
QUICK = 36
"""Inputs of each `make test`, spread over the kinds."""
DAMAGED = 400


@pytest.fixture(scope="module")
def whole(tiny_corpus: TinyCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run and what belongs to its victim."""
    folder = tmp_path_factory.mktemp("whole")
    make_run(folder, tiny_corpus)
    outside = folder / "outside"
    shutil.copytree(folder / "run", outside / "other")
    (outside / "kept.txt").write_text("kept\n")
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, with a FIFO."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "outside" / "fifo")
    return tmp_path


def tried(place: Path, *line: str, **options):
    """The program on the run in the folder, which is watched whole but for the cache that it may make."""
    program, *arguments = line
    return attempt(program, *arguments, watched=place, own=[place / "data"], cwd=place, **options)


def every_harm() -> list:
    """All of them in an order that spreads the kinds; the later ones are slow."""
    harms = [*HARMS.values(), *map(random_damage, range(DAMAGED))]
    random.Random(0).shuffle(harms)
    return [
        pytest.param(harm, id=harm.name, marks=[pytest.mark.slow] if index >= QUICK else [])
        for index, harm in enumerate(harms)
    ]


@pytest.mark.parametrize("harm", every_harm())
def test_a_foreign_run_is_only_read(harm: Harm, place: Path):
    draw = random.Random(harm.name)
    harm.do(place / "run", place / "outside", draw)
    for line in (READERS[0], draw.choice(READERS[1:])):
        outcome = tried(place, *line, str(place / "run"))
        assert outcome.faults({0, 77, 78}) == [], (line, outcome.code)
        if line[0] == "eval" and harm.refused:
            assert outcome.code == 78, outcome.out


LACKING = ["train.precision", "model.vocab_size", "data.tokenizer", "data.order", "model.attention.document_end"]


@pytest.mark.parametrize(
    "key",
    [
        *LACKING,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name, key in keys().items()
            if key.identity and name not in LACKING
        ),
    ],
)
def test_an_identity_without_a_key_is_refused_or_does_without(key: str, place: Path):
    identity_without(key).do(place / "run", place / "outside", random.Random(0))
    for line in READERS:
        assert tried(place, *line, str(place / "run")).faults({0, 77, 78}) == [], line


@pytest.mark.parametrize("harm", [harm for harm in FOREIGN if harm.name.startswith(("filter", "web", "cache"))][:4])
def test_as_a_program_of_its_own(harm: Harm, place: Path):
    harm.do(place / "run", place / "outside", random.Random(0))
    outcome = tried(place, "eval", "--checkpoint", str(place / "run"), fresh=True, seconds=30)
    assert outcome.faults({0, 77, 78}) == []
    assert (outcome.code == 78) == harm.refused


@pytest.mark.slow
def test_a_cache_that_a_checkpoint_names_is_not_made(place: Path):
    set_keys(place / "run", data__validation_path="embedded", data__cache=str(place / "outside" / "made"))
    outcome = tried(place, "eval", "--checkpoint", str(place / "run"), seconds=120)
    assert outcome.faults({0}) == []
    assert list((place / "data" / "cache").glob("embedded-*"))


def test_functions_run_by_the_users_word_alone(place: Path):
    """With --data they are left out and said; --config and --trust-checkpoint run them, which is said too."""
    run = place / "run"
    HARMS["filter-runs-a-command"].do(run, place / "outside", random.Random(0))
    line = ["eval", "--checkpoint", str(run)]
    unasked = tried(place, *line)
    assert unasked.faults({78}) == []
    for words in ("data.filter=subprocess:run", "--data", f"--config ({run / 'config.yaml'}", "--trust-checkpoint"):
        assert words in unasked.err
    named = tried(place, *line, "--data", str(run / "row.json"))
    assert named.faults({0}) == []
    assert "not used" in named.err and "data.filter=subprocess:run" in named.err
    for consent in (["--trust-checkpoint"], ["--config", str(run / "config.yaml")]):
        ran = tried(place, *line, *consent)
        assert ran.changed, ran
        assert ("is trusted, with data.filter=subprocess:run" in ran.err) == (consent == ["--trust-checkpoint"])
        for name in ("made-by-a-function", "text"):
            (place / name).unlink()


def test_keys_of_the_users_own_configuration_win_but_for_the_model(place: Path, tiny_corpus: TinyCorpus):
    run, own = place / "run", place / "own.yaml"
    set_keys(run, data__validation_path="http://127.0.0.1:9/a.json.gz", data__filter="os:system")
    plain = f"data: {{validation_path: {tiny_corpus.validation}, filter: null}}\nmodel: {{d_model: 64}}\n"
    own.write_text(plain)
    outcome = tried(place, "eval", "--checkpoint", str(run), "--config", str(own))
    assert outcome.faults({0}) == []
    own.write_text(f"data: {{validation_path: {tiny_corpus.validation}}}\n")
    outcome = tried(place, "eval", "--checkpoint", str(run), "--config", str(own))
    assert outcome.faults({78}) == []
    assert "data.filter=os:system" in outcome.err and "127.0.0.1" not in outcome.err


def test_checkpoints_elsewhere_by_the_users_word_alone(place: Path):
    """A run with checkpoint.dir: named by --config, or trusted; else its place is said and not looked at."""
    run, kept = place / "run", place / "kept"
    set_keys(run, checkpoint__dir=str(kept))
    shutil.move(run / "checkpoints", kept)
    line = ["eval", "--checkpoint", str(run), "--tokenizer", str(run / "tokenizer.model")]
    unasked = tried(place, *line)
    assert unasked.faults({78}) == []
    assert f"says checkpoint.dir='{kept}'" in unasked.err
    for consent in (["--trust-checkpoint"], ["--config", str(run / "config.yaml")]):
        assert tried(place, *line, *consent).faults({0}) == []


OWN_METHOD = """
import pathlib
from stablelm.methods.axes import Method
pathlib.Path("made-by-a-method").touch()
METHOD = Method("own", "a paper", {"placement": "post"})
"""


@pytest.mark.slow
def test_a_method_by_import_path_is_imported_by_the_users_word_alone(place: Path):
    """Refused where a checkpoint names it; imported for --config that names it, and for --trust-checkpoint."""
    run = place / "run"
    (place / "own_method.py").write_text(OWN_METHOD)
    set_keys(run, model__method="own_method:METHOD")
    line = ["eval", "--checkpoint", str(run)]
    beside: dict = {"fresh": True, "seconds": 60, "PYTHONPATH": str(place)}
    for refused in (line, [*line, "--data", "embedded"], ["checkpoints", "verify", str(run)]):
        outcome = tried(place, *refused, **beside)
        assert "own_method:METHOD" in outcome.err + outcome.out
        assert outcome.code == 78, outcome
        assert not (place / "made-by-a-method").exists()
    own = ["eval", "--checkpoint", str(run), "--config", str(run / "config.yaml")]
    for agreed in (own, [*line, "--trust-checkpoint"], ["checkpoints", "verify", "--trust-checkpoint", str(run)]):
        outcome = tried(place, *agreed, **beside)
        assert outcome.code != 78 or "own_method" not in outcome.err, outcome
        assert (place / "made-by-a-method").exists()
        (place / "made-by-a-method").unlink()


@pytest.mark.slow
def test_a_loss_and_metrics_that_a_checkpoint_names_are_not_imported(place: Path):
    """Whatever reads a checkpoint trains nothing, so that they are not even imported for --trust-checkpoint."""
    run = place / "run"
    (place / "own_loss.py").write_text(
        "import pathlib\npathlib.Path('made-by-a-loss').touch()\nloss = figures = print\n"
    )
    set_keys(run, train__loss="own_loss:loss", observe__metrics=["own_loss:figures"])
    beside: dict = {"fresh": True, "seconds": 60, "PYTHONPATH": str(place)}
    for line in (["eval", "--checkpoint", str(run)], ["checkpoints", "verify", str(run)]):
        for consent in ([], ["--trust-checkpoint"]):
            outcome = tried(place, *line, *consent, **beside)
            assert outcome.faults({0}) == [], outcome
            assert not (place / "made-by-a-loss").exists()
