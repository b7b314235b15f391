"""What may differ on resume and what may not."""

import json

import pytest

from stablelm.config import rules
from stablelm.config.identity import ORDER, ORDER_KEY, differences, identity, may_extend
from stablelm.config.keys import keys
from stablelm.config.load import load


def make(*overrides: str, files: tuple[str, ...] = ("a.json.gz", "b.json.gz"), tokenizer: str = "1234") -> dict:
    length = [] if any(o.startswith(("train.tokens", "train.steps")) for o in overrides) else ["train.steps=100"]
    config = load([], [*length, "train.warmup_steps=10", *overrides]).config
    config = rules.resolve(config, pieces=4000, world_size=1, accelerate_precision=None)
    return identity(config, base_names=files, tokenizer_sha256=tokenizer)


def test_holds_the_identity_keys_as_json():
    found = make()
    assert set(found) == {name for name, key in keys().items() if key.identity} | {"data.order"}
    assert json.loads(json.dumps(found)) == found
    assert (found["data.path"], found["data.tokenizer"]) == (["a.json.gz", "b.json.gz"], "1234")
    assert found["train.betas"] == [0.9, 0.95]


def test_contract_of_free_keys():
    free = {name for name, key in keys().items() if not key.identity}
    assert free >= {
        "run.dir",
        "run.stop_after",
        "run.time_limit",
        "train.micro_batch_size",
        "train.compile",
        "data.workers",
    }
    for name, key in keys().items():
        if name.startswith(("engine.", "checkpoint.", "observe.", "evaluate.")):
            assert not key.identity, name
        if name.startswith("model."):
            assert key.identity, name


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "run.stop_after=3",
        "train.micro_batch_size=4",
        "train.compile=true",
        "engine.kind=ddp",
        "observe.every=1",
        "data.workers=0",
        "checkpoint.dir=/c",
        "data.path=/other/store/*.gz",
        "data.bad_rows=skip",
        "data.validation={web: {path: x.json, text_column: body}}",
        "model.kv_heads=6",
    ],
)
def test_free_to_change(override):
    assert differences(make(), make(override)) == []
    assert differences(make(), make(override)) == []


def test_a_run_from_before_other_optimizers_is_adamws():
    new = [
        name for name in make() if name.startswith(("train.optimizer", "train.muon.", "train.sophia.", "train.sam."))
    ]
    new += ["train.ema", "train.independent_decay", "train.eps_inside", "train.cooldown_shape", "train.power_after"]
    earlier = {name: value for name, value in make().items() if name not in (*new, "train.power_exponent")}
    assert differences(earlier, make()) == []
    assert differences(earlier, make("train.optimizer=lion")) == ["train.optimizer: saved with adamw, now lion"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.lr=1e-3", "train.lr: saved with 0.0003, now 0.001"),
        ("run.seed=1", "run.seed: saved with 0, now 1"),
        ("model.n_layers=13", "model.n_layers: saved with 12, now 13"),
        ("model.placement=post", "model.placement: saved with pre, now post"),
        ("train.betas=[0.9, 0.99]", "train.betas: saved with [0.9, 0.95], now [0.9, 0.99]"),
        ("model.tie_embeddings=true", "model.tie_embeddings: saved with false, now true"),
        ("data.text_unit=line", "data.text_unit: saved with file, now line"),
        ("run.init_from=x", "run.init_from: saved with null, now x"),
    ],
)
def test_refused(override, sentence):
    different = differences(make(), make(override))
    assert sentence in different
    assert differences(make(), make(override))


def test_other_data_or_tokenizer():
    assert differences(make(), make(files=("a.json.gz",))) == [
        'data.path: saved with ["a.json.gz", "b.json.gz"], now ["a.json.gz"]'
    ]
    assert differences(make(), make(tokenizer="99")) == ["data.tokenizer: saved with 1234, now 99"]


@pytest.mark.parametrize("name", ["train.schedule", "train.steps", "train.cooldown_steps", "train.warmup_steps"])
def test_a_saved_identity_without_a_key_is_told_and_no_crash(name):
    current = {"train.schedule": "wsd", "train.steps": 10, "train.cooldown_steps": 2, "train.warmup_steps": 1}
    current[ORDER_KEY] = ORDER
    saved = {key: value for key, value in current.items() if key != name}
    (sentence,) = differences(saved, current)
    assert sentence.startswith(f"{name}: saved with ")


def test_long_lists_show_what_differs():
    many = tuple(f"{i}.gz" for i in range(50))
    (sentence,) = differences(make(files=many), make(files=many[1:]))
    assert sentence == "data.path: saved with 50 entries, ['0.gz'] only here, now 49 entries, [] only here"


def test_a_method_counts_by_its_axes():
    assert differences(make("model.method=post_ln"), make("model.placement=post")) == []
    assert differences(make("model.method=post_ln"), make("model.placement=post")) == []
    assert differences(make("model.method=post_ln"), make()) != []


def test_tokens_count_by_their_steps():
    tokens = 100 * 32 * 512
    assert differences(make(), make(f"train.tokens={tokens}")) == []


def test_a_cosine_cannot_grow():
    (sentence,) = differences(make(), make("train.steps=200"), step=50)
    assert sentence == (
        "train.steps: saved with 100, now 200 "
        "(it may grow where train.schedule is constant, or wsd or power before its cooldown)"
    )


def test_constant_can_grow_but_not_shrink():
    short, long = make("train.schedule=constant"), make("train.schedule=constant", "train.steps=200")
    assert differences(short, long, step=100) == []
    assert differences(long, short, step=50) != []


def test_wsd_can_grow_before_its_cooldown():
    short = make("train.schedule=wsd", "train.steps=100", "train.cooldown_steps=20")
    long = make("train.schedule=wsd", "train.steps=200", "train.cooldown_steps=40")
    assert differences(short, long, step=80) == []
    assert differences(short, long) == []
    assert len(differences(short, long, step=81)) == 2


def test_wsd_may_not_already_be_past_the_new_cooldown():
    short = make("train.schedule=wsd", "train.steps=100", "train.cooldown_steps=20")
    long = make("train.schedule=wsd", "train.steps=110", "train.cooldown_steps=60")
    assert may_extend(short, long, 50)
    assert not may_extend(short, long, 51)


def test_growing_excuses_no_other_difference():
    saved = make("train.schedule=constant")
    different = differences(saved, make("train.schedule=constant", "train.steps=200", "train.lr=1"), step=1)
    assert any(sentence.startswith("train.lr") for sentence in different)


def test_the_learning_rate_before_the_step_does_not_change():
    """What `may_extend` promises, against the schedule itself."""
    from stablelm.train.schedule import learning_rate

    def resolved(*overrides: str):
        config = load([], ["train.schedule=wsd", "train.warmup_steps=10", *overrides]).config
        return rules.resolve(config, pieces=4000, world_size=1, accelerate_precision=None)

    configs = resolved("train.steps=100"), resolved("train.steps=150")
    saved, current = (identity(c, base_names=["a"], tokenizer_sha256="") for c in configs)
    for step in range(1, 101):
        same = all(learning_rate(s, configs[0].train) == learning_rate(s, configs[1].train) for s in range(1, step + 1))
        assert may_extend(saved, current, step) == same, step


def test_a_run_saved_before_a_key_existed_had_its_default():
    new = ("data.packing", "data.document_mask", "data.mixture", "model.attention.document_end")
    new += ("model.keel.alpha", "model.mix_ln.share", "model.layerscale.start", "model.skipinit.start")
    old = {name: value for name, value in make().items() if name not in new}
    assert differences(old, make()) == []
    (line,) = differences(old, make("data.packing=best_fit"))
    assert line == "data.packing: saved with split, now best_fit"


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("model.value_residual.learned", "value_residual"),
        ("model.denseformer.dilation", "denseformer"),
        ("model.denseformer.period", "denseformer"),
        ("model.dyt.attention_alpha", "pre_ln"),
        ("model.dyt.other_alpha", "pre_ln"),
    ],
)
def test_options_that_methods_got_later_have_the_plain_value(key, method):
    saved = make(f"model.method={method}")
    del saved[key]
    assert differences(saved, make(f"model.method={method}")) == []


def test_a_run_that_does_not_say_its_order_has_the_first_one():
    saved = make()
    assert saved.pop("data.order") == 2
    (sentence,) = differences(saved, make())
    assert sentence.startswith("data.order: saved by a program that reads the rows of files in order 1, now 2; ")
    assert "run.init_from" in sentence


AXIS_KEYS = ("model.stack", "model.depth_drop", "model.gains")


def test_a_run_saved_before_an_axis_existed_has_the_plain_value():
    """Its identity.json lacks the keys and the options of the axis."""
    saved = {name: value for name, value in make().items() if name not in AXIS_KEYS}
    saved = {name: value for name, value in saved.items() if not name.startswith(("model.shared.", "model.drop."))}
    saved = {name: value for name, value in saved.items() if not name.startswith(("model.ngpt.", "run.grow"))}
    assert differences(saved, make()) == []
    assert differences(saved, make("model.stack=cycle")) == ["model.stack: saved with plain, now cycle"]
    assert differences(saved, make("run.grow_from=x")) == ["run.grow_from: saved with null, now x"]
