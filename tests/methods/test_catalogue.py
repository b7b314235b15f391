"""Named methods and how they fill the axes."""

from dataclasses import fields, replace

import pytest

from stablelm.config.schema import AttentionConfig, ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS, apply_method, problems, values
from stablelm.methods.pre_ln import Residual

AXES = {"stream", "placement", "norm", "embedding_norm", "init", "reparam", "activation", "bias", "tie_embeddings"} | {
    *("stack", "depth_drop", "gains")
}
ATTENTION = {"position", "qk_norm", "logit_cap", "value_residual", "low_rank", "value_maps"} | {
    *("shaping", "gate", "softmax")
}


def _value(model: ModelConfig, key: str) -> object:
    return getattr(model.attention, key.removeprefix("attention.")) if "." in key else getattr(model, key)


def test_the_axes_are_what_a_method_fills():
    unset, filled = ModelConfig(), apply_method(ModelConfig())
    filled_keys = {f.name for f in fields(filled) if getattr(filled, f.name) != getattr(unset, f.name)}
    assert filled_keys == AXES | {"attention"}
    none = {f.name for f in fields(AttentionConfig) if getattr(unset.attention, f.name) is None}
    assert none == ATTENTION | {"document_end"}  # which the tokenizer fills


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_pre_ln_but_for_what_it_states(name):
    method, base = METHODS[name], apply_method(ModelConfig(method="pre_ln"))
    assert method.name == name
    assert method.paper
    assert method.defaults.keys() <= AXES | {f"attention.{key}" for key in ATTENTION}
    model = apply_method(ModelConfig(method=name))
    for key in (*AXES, *(f"attention.{key}" for key in ATTENTION)):
        value = _value(model, key)
        assert value is not None, key
        assert value == method.defaults.get(key, _value(base, key))
        # A default that says what pre_ln has too would hide what the method is.
        assert (value != _value(base, key)) == (key in method.defaults) or name == "pre_ln", key
    assert model.axes.placement is values("placement")[str(model.placement)]
    assert problems(model) == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("position", ["learned", "alibi", "rope", "none"])
def test_only_alibi_with_shaped_attention_is_refused(name, position):
    model = apply_method(ModelConfig(method=name, attention=AttentionConfig(position=position)))
    assert bool(problems(model)) == (model.axes.shaping.active and position == "alibi")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("deepscalelm_sigma", ("deepscalelm_pre", "sigma_reparam")),
        ("magneto_sigma", ("magneto", "sigma_reparam")),
        ("catformer_sigma", ("catformer", "sigma_reparam")),
    ],
)
def test_combinations_are_the_union_of_their_parts(name, parts):
    first, second = (METHODS[part] for part in parts)
    assert METHODS[name].defaults == {**first.defaults, **second.defaults} == {**second.defaults, **first.defaults}
    assert first.paper in METHODS[name].paper and second.paper in METHODS[name].paper


def test_the_three_points():
    pre, post, gpt2 = (apply_method(ModelConfig(method=name)) for name in ("pre_ln", "post_ln", "gpt2"))
    assert (pre.placement, pre.init, pre.bias, pre.tie_embeddings) == ("pre", "xavier", False, False)
    assert replace(post, method="pre_ln", placement="pre") == pre
    assert (gpt2.init, gpt2.bias, gpt2.tie_embeddings, gpt2.attention.position) == ("gpt2", True, True, "learned")


def test_keys_that_are_set_override_the_method():
    own = {"placement": "post", "norm": "rmsnorm", "init": "gpt2", "activation": "swiglu", "bias": True}
    attention = AttentionConfig(
        "none",
        500.0,
        qk_norm=True,
        logit_cap=9.0,
        value_residual=True,
        low_rank=0.25,
        value_maps=True,
        shaping="none",
        gate="headwise",
        softmax="sink",
    )
    model = apply_method(ModelConfig(method="pre_ln", tie_embeddings=True, attention=attention, **own))
    assert {key: getattr(model, key) for key in own} == own
    assert model.tie_embeddings is True
    assert model.attention == attention


def test_false_is_a_set_value():
    model = apply_method(ModelConfig(method="gpt2", bias=False, tie_embeddings=False))
    assert (model.bias, model.tie_embeddings) == (False, False)


def test_other_keys_are_left_alone():
    model = ModelConfig(method="gpt2", n_layers=7, dropout=0.3)
    filled = apply_method(model)
    others = {f.name for f in fields(ModelConfig)} - AXES - {"attention"}
    assert {name: getattr(filled, name) for name in others} == {name: getattr(model, name) for name in others}
    assert apply_method(filled) == filled


@pytest.mark.parametrize(("name", "mend"), [("preln", "did you mean pre_ln"), ("zzz", "choose one of pre_ln, post_ln")])
def test_an_unknown_method_is_named_with_its_mend(name, mend):
    with pytest.raises(ConfigError, match=rf"model\.method={name}.*{mend}"):
        apply_method(ModelConfig(method=name))


@pytest.mark.parametrize(
    ("d_model", "activation", "d_ff"),
    [(128, "gelu", 512), (100, "relu", 400), (96, "swiglu", 256), (128, "swiglu", 384), (4096, "swiglu", 10944)],
)
def test_default_feedforward_width(d_model, activation, d_ff):
    model = apply_method(ModelConfig(d_model=d_model, activation=activation))
    assert model.axes.stream.sized(model).d_ff == d_ff


def test_streams_are_functional_and_join_is_associative():
    import torch

    stream = Residual()
    a, f = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    start = stream.start(a)
    new = stream.write(start, f, {})
    assert torch.equal(stream.finish(stream.join(start, new)), torch.full((1, 2, 3), 3.0))
    assert torch.equal(stream.read(start, {}), torch.ones(1, 2, 3))
    newer = stream.write(new, f.bfloat16(), {})
    assert newer[0].dtype == torch.float32
    left, right = stream.join(stream.join(start, new), newer), stream.join(start, stream.join(new, newer))
    assert torch.equal(stream.finish(left), stream.finish(right))


def test_what_checks_a_configuration_needs_no_torch():
    import subprocess
    import sys

    modules = "stablelm.methods.catalogue, stablelm.methods.stds, stablelm.config.rules"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
