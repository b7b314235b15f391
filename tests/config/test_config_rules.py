"""Each rule has its sentence; derived keys get their values."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stablelm.config import rules
from stablelm.config.load import dump, load
from stablelm.config.schema import Config
from stablelm.errors import ConfigError


def resolve(*overrides: str, pieces: int = 4000, world_size: int = 1, precision: str | None = None) -> Config:
    given = ["train.steps=10"] if not any("train.steps" in o or "train.tokens" in o for o in overrides) else []
    loaded = load([], [*given, *overrides])
    return rules.resolve(
        loaded.config,
        pieces=pieces,
        world_size=world_size,
        accelerate_precision=precision,
        origins=loaded.origins,
    )


def problems(*overrides: str, **around) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(*overrides, **around)
    assert caught.value.exit_code == 78
    return str(caught.value).splitlines()


def test_derived_values():
    config = resolve("data.seq_len=128", "model.d_model=96", "run.dir=runs/x/", pieces=4001)
    model, train = config.model, config.train
    assert (model.kv_heads, model.d_ff, model.max_seq_len, model.vocab_size) == (6, 384, 128, 4032)
    assert (model.stream, model.placement, model.attention.position) == ("residual", "pre", "rope")
    assert (train.steps, train.micro_batch_size, train.precision, train.cooldown_steps) == (10, 32, "fp32", 0)
    assert train.min_lr == pytest.approx(3e-5)
    assert config.checkpoint.dir == "runs/x/checkpoints"


def test_what_is_set_stays():
    config = resolve(
        "model.kv_heads=2",
        "model.d_ff=100",
        "model.max_seq_len=1024",
        "model.vocab_size=4000",
        "model.norm=rmsnorm",
        "train.min_lr=0",
        "train.micro_batch_size=4",
        "train.precision=fp64",
        "checkpoint.dir=/c",
        "train.cooldown_steps=0",
        "train.schedule=wsd",
    )
    model, train = config.model, config.train
    assert (model.kv_heads, model.d_ff, model.max_seq_len, model.vocab_size) == (2, 100, 1024, 4000)
    assert (model.norm, train.min_lr, train.micro_batch_size, train.precision) == ("rmsnorm", 0, 4, "fp64")
    assert (config.checkpoint.dir, train.cooldown_steps) == ("/c", 0)


def test_wsd_cools_down_over_a_fifth():
    assert resolve("train.schedule=wsd", "train.steps=50").train.cooldown_steps == 10


def test_micro_batch_of_several_ranks():
    assert resolve(world_size=4).train.micro_batch_size == 8


def test_precision_of_accelerate():
    assert resolve(precision="bf16").train.precision == "bf16"
    assert resolve("train.precision=bf16", precision="bf16").train.precision == "bf16"


def test_tokens_become_whole_steps_and_stay():
    config = resolve("train.tokens=16385", "data.seq_len=512")
    assert (config.train.steps, config.train.tokens) == (2, 16385)


def test_warm_up_may_be_longer_than_the_run():
    assert resolve("train.steps=5", "train.warmup_steps=100").train.warmup_steps == 100


@settings(deadline=None)  # a busy machine is no error
@given(
    tokens=st.integers(1, 10**12),
    batch=st.integers(1, 64),
    world=st.integers(1, 8),
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
)
def test_resolving_a_resolved_configuration_changes_nothing(tmp_path_factory, tokens, batch, world, schedule):
    assume(768 % world == 0)
    config = resolve(
        f"train.tokens={tokens}",
        f"train.global_batch_size={batch * world}",
        f"train.schedule={schedule}",
        world_size=world,
    )
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(dump(config))
    loaded = load([str(path)], []).config
    assert rules.resolve(loaded, pieces=4000, world_size=world, accelerate_precision=None) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.d_model=100"], "model.d_model=100 is not divisible by model.n_heads=6; use 5 or 10 heads"),
        (
            ["model.d_model=48", "model.n_heads=16"],
            "model.d_model=48 gives each of model.n_heads=16 heads an odd width, which rope cannot halve; "
            "use 12 or 24 heads",
        ),
        (
            ["model.d_model=7", "model.n_heads=2"],
            "model.d_model=7 is not divisible by model.n_heads=2; use an even width",
        ),
        (["model.kv_heads=4"], "model.kv_heads=4 does not divide model.n_heads=6; use 3 or 6 key/value heads"),
        (["model.kv_heads=9"], "model.kv_heads=9 does not divide model.n_heads=6; use 6 key/value heads"),
        (["model.dropout=1"], "model.dropout=1.0 must be at least 0 and below 1"),
        (["model.dropout=-0.1"], "model.dropout=-0.1 must be at least 0 and below 1"),
        (
            ["model.vocab_size=3999"],
            "model.vocab_size=3999 is smaller than the tokenizer, which has 4000 pieces; leave it out or use "
            "4000 to 4096",
        ),
        (
            ["model.vocab_size=4097"],
            "model.vocab_size=4097 is larger than the tokenizer, which has 4000 pieces; leave it out or use "
            "4000 to 4096",
        ),
        (["model.max_seq_len=511"], "model.max_seq_len=511 is below data.seq_len=512; raise it or leave it out"),
        (["model.method=preln"], "model.method=preln is not a known method: did you mean pre_ln?"),
        (
            ["train.tokens=99", "train.steps=10"],
            "train.steps=10 contradicts train.tokens=99, which makes it 1; set one of them and the other to null",
        ),
        (["train.steps=null"], "train.steps and train.tokens are both missing; set one of them"),
        (
            ["train.cooldown_steps=11"],
            "train.cooldown_steps=11 is more than the 10 steps of the run; lower it or leave it out",
        ),
        (
            ["train.micro_batch_size=5"],
            "train.micro_batch_size=5 on 1 process does not divide train.global_batch_size=32; use 4 or 8",
        ),
        (["train.lr=0"], "train.lr=0.0 must be above 0"),
        (
            ["train.lr=1e-4", "train.min_lr=1e-3"],
            "train.min_lr=0.001 is above train.lr=0.0001; lower it or leave it out",
        ),
        (["train.min_lr=-1"], "train.min_lr=-1.0 must be at least 0"),
        (["train.betas=[0.9, 1]"], "train.betas=[0.9, 1.0] must be two numbers at least 0 and below 1"),
        (["train.grad_clip=-1"], "train.grad_clip=-1.0 must be at least 0"),
        (["run.stop_after=0"], "run.stop_after=0 must be at least 1"),
        (
            ["run.time_limit=soon"],
            "run.time_limit=soon is not a length of time above zero; write seconds, 90s, 10m, 2h, MM:SS, "
            "HH:MM:SS or D-HH:MM:SS",
        ),
        (["run.dir="], "run.dir=null must be a string"),
        (["run.dir=' '"], "run.dir=  must be a directory's name"),
        (["observe.profile=[3, 2]"], "observe.profile=[3, 2] must be the first and the last step, counted from 1"),
        (["observe.profile=[0, 2]"], "observe.profile=[0, 2] must be the first and the last step, counted from 1"),
        (["evaluate.batches=0"], "evaluate.batches=0 must be at least 1"),
        (["evaluate.micro_batch_size=0"], "evaluate.micro_batch_size=0 must be at least 1"),
        (["evaluate.every=-1"], "evaluate.every=-1 must be at least 0"),
        (["observe.every=-1"], "observe.every=-1 must be at least 0"),
        (["checkpoint.every=-1"], "checkpoint.every=-1 must be at least 0"),
        (["checkpoint.keep=0"], "checkpoint.keep=0 must be at least 1"),
        (["model.n_layers=0"], "model.n_layers=0 must be at least 1"),
        (["model.n_heads=0"], "model.n_heads=0 must be at least 1"),
        (["data.lanes=0"], "data.lanes=0 must be at least 1"),
        (["train.global_batch_size=0"], "train.global_batch_size=0 must be at least 1"),
        (
            ["data.validation={a b: x}"],
            "data.validation.a b: the name of a validation set has only letters, digits, _ and -; rename it",
        ),
        (
            ["data.validation={web: {text_column: body}}"],
            "data.validation.web has no path; give one, as in data.validation.web.path=...",
        ),
        (
            ["data.validation={web: {path: x, column: body}}"],
            "data.validation.web.column: a validation set has a path and a text_column; give one of these",
        ),
    ],
)
def test_a_broken_rule(overrides, message):
    (line,) = problems(*overrides)
    assert line.startswith(message + " (") or line == message
    if "missing" not in message:
        assert f"argument {overrides[-1]}" in line


def test_two_default_validation_sets():
    (line,) = problems("data.validation_path=x", "data.validation.default=y")
    assert line == (
        "data.validation_path and data.validation.default both give the validation set 'default'; drop one "
        "(argument data.validation_path=x, argument data.validation.default=y)"
    )


def test_odd_heads_are_fine_without_rope():
    assert resolve("model.d_model=48", "model.n_heads=16", "model.attention.position=none").model.n_heads == 16


@pytest.mark.parametrize("vocab", [4000, 4001, 4096])
def test_padding_of_the_vocabulary(vocab):
    assert resolve(f"model.vocab_size={vocab}").model.vocab_size == vocab


def test_world_size_and_lanes():
    assert problems("data.lanes=10", "train.global_batch_size=12", world_size=3) == [
        "data.lanes=10 must be divisible by the number of processes, 3; start 2 or 5 processes, "
        "or a new run with 9 or 12 lanes (argument data.lanes=10)"
    ]


def test_world_size_and_batch():
    assert problems("train.global_batch_size=10", world_size=4) == [
        "train.global_batch_size=10 must be divisible by the number of processes, 4; use 8 or 12, "
        "or start 2 processes (argument train.global_batch_size=10)"
    ]


def test_world_size_and_micro_batch():
    assert problems("train.global_batch_size=24", "train.micro_batch_size=5", world_size=2) == [
        "train.micro_batch_size=5 on 2 processes does not divide train.global_batch_size=24; use 4 or 6 "
        "(argument train.micro_batch_size=5, argument train.global_batch_size=24)"
    ]


def test_the_sizes_that_are_named_do_fit():
    for batch in ("use 8", "use 12"):
        assert resolve(f"train.global_batch_size={batch.split()[1]}", world_size=4)


def test_one_process_engine_with_several():
    (line,) = problems("engine.kind=single", world_size=2)
    assert line.startswith("engine.kind=single cannot use the 2 processes that were started; use ddp, fsdp2 or auto")


def test_precision_against_accelerate():
    (line,) = problems("train.precision=fp32", precision="bf16")
    assert line.startswith(
        "train.precision=fp32 contradicts accelerate's mixed precision bf16; drop the flag or the key"
    )


def test_all_problems_at_once(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  d_model: 100\n  kv_heads: 4\n")
    loaded = load([str(path)], ["train.steps=5", "model.vocab_size=3"])
    with pytest.raises(ConfigError) as caught:
        rules.resolve(loaded.config, pieces=9, world_size=5, accelerate_precision=None, origins=loaded.origins)
    lines = str(caught.value).splitlines()
    assert [line.split("=")[0] for line in lines] == [
        "model.d_model",
        "model.kv_heads",
        "data.lanes",
        "train.global_batch_size",
        "model.vocab_size",
    ]
    assert lines[0].endswith(f"({path}:2)")


def test_check_needs_no_tokenizer():
    config = load([], ["train.steps=1", "model.vocab_size=1"]).config
    rules.check(config, 1, None)
    with pytest.raises(ConfigError, match="must be divisible by"):
        rules.check(config, 5, None, {})


def test_a_huge_number_is_answered_at_once():
    (line,) = problems("model.d_model=1000000007")
    assert line.startswith("model.d_model=1000000007 is not divisible by model.n_heads=6; use ")


def test_document_mask_takes_the_tokenizers_end():
    loaded = load([], ["train.steps=1", "data.document_mask=true"])
    around = {"pieces": 4000, "world_size": 1, "accelerate_precision": None}
    config = rules.resolve(loaded.config, eos=7, **around)
    assert config.model.attention.document_end == 7
    assert rules.resolve(config, eos=7, **around) == config
    assert resolve().model.attention.document_end is None


def test_document_mask_is_refused_where_it_makes_no_sense():
    (line,) = problems("data.document_mask=true", "model.method=e_spa")
    assert "espa" in line and line.split(" (")[0].endswith("use data.document_mask=false")
    (line,) = problems("model.attention.document_end=3")
    assert "model.attention.document_end=3 is set by data.document_mask=true" in line


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["engine.kind=ddp", "engine.accumulate=sharded"],
            "engine.accumulate=sharded means nothing to engine.kind=ddp",
        ),
        (
            ["engine.kind=zero2", "engine.reshard_after_forward=never"],
            "engine.reshard_after_forward=never means nothing to engine.kind=zero2; leave it out or use fsdp2 or hsdp",
        ),
        (
            ["engine.kind=fsdp2", "engine.reduce_dtype=bf16"],
            "engine.reduce_dtype=bf16 would round the gradients of train.precision=fp32",
        ),
        (
            ["engine.kind=fsdp2", "engine.reduce_dtype=bf16", "engine.accumulate=local", "train.precision=bf16"],
            "engine.accumulate=local would add up micro-batches in engine.reduce_dtype=bf16",
        ),
        (["engine.gc_every=-1"], "engine.gc_every=-1 must be at least 0"),
        (["engine.memory_budget=0.5"], "engine.memory_budget=0.5 is spent by torch.compile; set train.compile=true"),
    ],
)
def test_settings_of_engines_that_do_nothing_or_harm(overrides: list[str], words: str):
    (problem,) = problems(*overrides)
    assert problem.startswith(words)


def test_settings_of_engines_that_are_taken():
    resolve("engine.accumulate=sharded", "engine.kind=fsdp2", "train.compile=auto")
    resolve("engine.reduce_dtype=bf16", "engine.kind=fsdp2", precision="bf16")
    resolve("engine.kind=zero3", "train.compile=auto")
