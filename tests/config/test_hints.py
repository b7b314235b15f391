"""Hints are near or absent, ranges are ranges, and a wrong value hides no other mistake."""

from pathlib import Path

import pytest

from stablelm.config import rules
from stablelm.config.hints import nearest
from stablelm.config.keys import keys, takes_text
from stablelm.config.load import load
from stablelm.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("observe.profile.start", "observe.profile"),
        ("train.lr.x", "train.lr"),
        ("model.attention.position.base", "model.attention.position"),
        ("model.lr", "train.lr"),
        ("lr", "train.lr"),
        ("steps", "train.steps"),
        ("model.qk_norm", "model.attention.qk_norm"),
        ("model.atention.qk_norm", "model.attention.qk_norm"),
        ("trian.stpes", "train.steps"),
        ("train.stpes", "train.steps"),
        ("TRAIN.LR", "train.lr"),
        ("model.layers", "model.n_layers"),
        ("data.tokeniser", "data.tokenizer"),
        ("train.batchsize", "train.micro_batch_size"),
        ("<<", None),
        ("zzz.qqq", None),
        ("optimizer.foreach", None),
        ("observe.wandb", None),
        ("data.streaming", None),
        ("x", None),
    ],
)
def test_what_was_meant(name: str, near: str | None):
    assert nearest(name) == near


@pytest.mark.parametrize("name", list(keys()))
def test_a_key_below_a_key_means_that_key(name: str):
    assert nearest(f"{name}.start") == name


def test_the_merge_key_of_yaml_is_told(tmp_path: Path):
    file = tmp_path / "a.yaml"
    for content in ("base: &b {lr: 1}\ntrain:\n  <<: *b\n", "x: &x {train: {lr: 1}}\nmodel: {}\n<<: *x\n"):
        file.write_text(content)
        with pytest.raises(ConfigError) as caught:
            load([str(file)], [])
        told = f"{file}:3: YAML's merge key << is not supported; give several --config files instead"
        assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("pieces", "vocab", "fix"),
    [
        (32000, 32128, "use 32000"),
        (32000, 31999, "use 32000"),
        (32100, 33000, "use 32100 to 32128"),
        (128, 129, "use 128"),
    ],
)
def test_a_range_of_one_number_is_that_number(pieces: int, vocab: int, fix: str):
    loaded = load([], ["train.steps=1", f"model.vocab_size={vocab}"])
    with pytest.raises(ConfigError) as caught:
        rules.resolve(loaded.config, pieces=pieces, world_size=1, accelerate_precision=None)
    assert str(caught.value).endswith(f"leave it out or {fix}")


def test_one_of_something_is_singular():
    loaded = load([], ["train.steps=1", "data.lanes=1", "train.global_batch_size=1", "faults.hang=[1, 2]"])
    with pytest.raises(ConfigError) as caught:
        rules.check(loaded.config, 2, None)
    told = str(caught.value)
    assert "start 1 process, or a new run with 2 lanes" in told
    assert "use 2, or start 1 process" in told
    with pytest.raises(ConfigError, match="must name rank 0, the only one"):
        rules.check(load([], ["train.steps=1", "faults.hang=[1, 2]", "faults.allow=true"]).config, 1, None)


def told(*overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load([], list(overrides), world_size=world_size)
    return [line.rpartition(" (")[0] or line for line in str(caught.value).splitlines()]


def test_a_wrong_type_hides_nothing():
    assert told(
        "train.lr=fast", "model.method=preln", "model.d_model=100", "data.lanes=10", "train.stpes=3",
        "train.warmup_steps=-1", "guards.window=1", "data.text_column=", "data.cache=$HOME/x",
        world_size=3,
    ) == [
        "train.lr=fast must be a number",
        "unknown key train.stpes, did you mean train.steps?",
        "data.text_column=null must be a string",
        "data.cache=$HOME/x holds a $, but variables are not expanded in paths; write ~/x",
        "train.warmup_steps=-1 must be at least 0",
        "guards.window=1 must be at least 2",
        "model.method=preln is not a known method: did you mean pre_ln?",
        "model.d_model=100 is not divisible by model.n_heads=6; use 5 or 10 heads",
        "data.lanes=10 must be divisible by the number of processes, 3; start 2 or 5 processes, "
        "or a new run with 9 or 12 lanes",
        "train.global_batch_size=32 must be divisible by the number of processes, 3; "
        "use 30 or 33, or start 2 processes",
    ]  # fmt: skip


def test_a_value_out_of_range_hides_nothing():
    loaded = load([], ["train.steps=1", "model.dropout=2", "model.method=preln", "model.kv_heads=4"])
    with pytest.raises(ConfigError) as caught:
        rules.check(loaded.config, 1, None)
    assert [line.split("=")[0] for line in str(caught.value).splitlines()] == [
        "model.dropout",
        "model.method",
        "model.kv_heads",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.n_heads=x", "model.d_model=100", "train.steps=1"],
        ["model.n_head=4", "model.d_model=100", "train.steps=1"],
        ["train.steps=x"],
        ["train.stepss=3"],
        ["data.mixture.web.path=$A/b", "data.mixture.web.weight=1", "train.steps=1"],
        ["data.mixture.web.path=a", "data.mixture.web.weight=true", "train.steps=1"],
        ["model.method=3", "model.reparam=sigma", "train.steps=1"],
        ["train.global_batch_size=x", "train.micro_batch_size=5", "train.steps=1"],
    ],
)
def test_nothing_is_said_that_comes_of_the_mistake_itself(overrides: list[str]):
    assert len(told(*overrides)) == 1


def test_a_file_that_cannot_be_read_is_all_that_is_told():
    (line,) = told("train.lr", world_size=1)
    assert "must have the form" in line


def test_every_key_of_words_says_whether_it_is_a_path():
    """A new key that takes any text cannot forget it."""
    unsaid = [key.name for key in keys().values() if _words(key.type) and key.path is None]
    assert unsaid == []
    needless = [key.name for key in keys().values() if not _words(key.type) and key.path is not None]
    assert needless == []


def _words(kind) -> bool:
    return takes_text(kind) or "dict[str, str" in str(kind)
