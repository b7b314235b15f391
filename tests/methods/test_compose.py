"""Every pair of values of the model's axes trains or is refused with a way on; so do random combinations."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pairwise import Case, all_pairs, cover, pairs_of
from support.refusals import every_reason, refusals

from stablelm.config.keys import choices
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.methods import catalogue
from stablelm.methods.axes import Refusal
from stablelm.methods.catalogue import METHODS
from stablelm.methods.mlra import LowRank
from stablelm.methods.pre_ln import OwnValues, WholeMaps
from stablelm.methods.sigma_reparam import SigmaOptions
from stablelm.methods.simplified import NoValues
from stablelm.methods.sizes import parameter_counts
from stablelm.methods.value_residual import ValueResidual
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise

# Axes that exclude one another come first: the cover's search is short then.
AXES: dict[str, tuple] = {
    **{axis: choices(f"model.{axis}") for axis in ("stream", "attention.shaping", "init", "placement")},
    "attention.value_maps": (True, False),
    **{axis: choices(f"model.{axis}") for axis in ("stack", "depth_drop", "gains")},
    # reparam, sigma.targets and sigma.gamma
    "sigma": ("none", "wesar", "unit_length", "all spectral", "all one", "attention spectral", "attention one"),
    "activation": choices("model.activation"),
    "attention.position": choices("model.attention.position"),
    "attention.qk_norm": (False, True),
    "attention.value_residual": (False, True),
    "norm": choices("model.norm"),
    "attention.logit_cap": (0, 30),
    "attention.gate": choices("model.attention.gate"),
    "attention.softmax": choices("model.attention.softmax"),
    "attention.low_rank": (0, 0.5),
    "bias": (False, True),
    "tie_embeddings": (False, True),
    "kv_heads": (1, 2),
    "dropout": (0, 0.1),
    "embedding_norm": (False, True),
}
SEQ_LEN, VOCABULARY = 16, 64
TINY = {
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 2,
    # The defaults fit deeper and wider models: lambda would be 0, and completep's ratios 1.
    "deepscale.k": 0.5,
    "completep.base_depth": 1,
    "completep.base_width": 16,
}


def _keys(case: Case) -> dict[str, Any]:
    """Keys of the model section: the axis `sigma` is three of them."""
    keys: dict[str, Any] = dict(case)
    sigma = str(keys.pop("sigma", "")).split()
    if sigma:
        keys["reparam"] = sigma[0] if len(sigma) == 1 else "sigma"
        keys["sigma.targets"], keys["sigma.gamma"] = sigma if len(sigma) == 2 else ("all", "spectral")
    return keys


def _resolved(keys: dict[str, Any]) -> Config:
    settings = [f"model.{key}={str(value).lower()}" for key, value in (TINY | keys).items()]
    loaded = load([], [*settings, f"data.seq_len={SEQ_LEN}", "train.steps=3", "train.lr=1e-3", "train.warmup_steps=0"])
    return resolve(loaded.config, pieces=VOCABULARY, world_size=1, accelerate_precision=None, origins=loaded.origins)


def _forbidden(case: Case) -> bool:
    """Whether what a partial case sets is refused; a refusal that reads more is not known to be."""
    keys = _keys(case)
    axes = {axis: catalogue.values(axis)[keys[key]] for axis, key in catalogue.KEYS.items() if key in keys}
    if "attention.value_residual" in keys:
        axes["value_mixing"] = ValueResidual() if keys["attention.value_residual"] else OwnValues()
    if keys.get("attention.value_maps") is False:
        axes["maps"] = NoValues()
    elif "attention.low_rank" in keys:
        axes["maps"] = LowRank() if keys["attention.low_rank"] else WholeMaps()
    elif "attention.value_maps" in keys:
        axes["maps"] = WholeMaps()

    def option(kind: type) -> Any:
        if kind is not SigmaOptions:
            return kind()
        return SimpleNamespace(**{k: keys[f"sigma.{k}"] for k in ("gamma", "targets")})

    inside = {key.removeprefix("attention."): value for key, value in keys.items() if key.startswith("attention.")}
    sizes = {"n_layers": TINY["n_layers"], "d_model": TINY["d_model"], "n_heads": 2}
    outside = {key: keys[key] for key in ("kv_heads", "dropout") if key in keys}
    outside["tie_embeddings"] = keys.get("tie_embeddings", False)
    parts = {"axes": SimpleNamespace(**axes), "attention": SimpleNamespace(**inside), "option": option}
    model: Any = SimpleNamespace(**sizes, **outside, **parts)
    return any(_refuses(value, model) for value in axes.values())


def _refuses(value: Any, model: Any) -> bool:
    try:
        return any(True for _ in value.refusals(model))
    except (AttributeError, KeyError):
        return False


COVER = cover(AXES, _forbidden, seed=0)


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(VOCABULARY, (2, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:]


def test_the_cover_holds_every_pair_but_the_refused():
    covered = set().union(*(pairs_of(case) for case in COVER.cases))
    assert covered == COVER.possible
    assert covered | COVER.impossible == set(all_pairs(AXES))
    assert not covered & COVER.impossible
    assert len(COVER.possible) > 10 * len(COVER.impossible) > 0
    *_, second, first = sorted(len(choices) for choices in AXES.values())
    assert len(COVER.cases) < 1.2 * first * second  # the pairs of the two longest axes alone need as many


def test_no_legal_case_holds_a_pair_that_is_called_impossible():
    drawer, legal = random.Random(0), 0
    for _ in range(1000):
        axes = drawer.sample(list(AXES), drawer.randint(1, len(AXES)))
        case = drawer.choice(COVER.cases) | {axis: drawer.choice(AXES[axis]) for axis in axes}
        if not _forbidden(case):
            legal += 1
            assert pairs_of(case) <= COVER.possible
    assert legal > 200


@pytest.mark.parametrize(
    "pair",
    [
        (("stream", "concat"), ("placement", "post")),
        (("stream", "skipless"), ("init", "gpt2")),
        (("attention.shaping", "espa"), ("sigma", "all spectral")),
        (("attention.shaping", "uspa"), ("placement", "peri")),  # by way of the stream: no rule names both
    ],
)
def test_pairs_that_rules_exclude_are_impossible(pair):
    assert pair in COVER.impossible


@pytest.mark.parametrize("case", COVER.cases, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_every_possible_pair_trains(case):
    config = _resolved(_keys(case))
    assert catalogue.problems(config.model) == []
    engine = TorchEngine(config, "single", Ranks(0, 1, torch.device("cpu"), None, None))
    parameters = engine.parameters()
    assert parameter_counts(config.model)["total"] == sum(parameter.numel() for parameter in parameters.values())
    torch.manual_seed(0)  # dropout
    for _ in range(3):
        sums = engine.loss(*_batch())
        engine.backward(sums.total / sums.valid, last=True)
        assert math.isfinite(sums.total.item())
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        engine.step(1e-3)
    assert all(tensor.isfinite().all() for tensor in engine.tensors().values())


E_SPA, U_SPA, SKIPS = ({"method": name} for name in ("e_spa", "u_spa", "e_spa_skips"))
VALUE_SKIP, SAS = {"method": "value_skipinit"}, {"method": "sas"}
# What breaks a rule, and what mends it.
EXAMPLES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stream": "deepnorm"}, {"placement": "post"}),
    ({"stream": "concat", "placement": "post"}, {"placement": "sub"}),
    ({"stream": "rezero", "placement": "peri"}, {"placement": "none"}),
    ({"stream": "depth_attention", "placement": "post"}, {"placement": "pre"}),
    (VALUE_SKIP | {"attention.shaping": "shaped"}, {"attention.shaping": "value_skip"}),
    (VALUE_SKIP | {"init": "fan_in"}, {"init": "orthogonal"}),
    (E_SPA | {"placement": "pre", "activation": "relu", "n_layers": 12}, {"n_layers": 4}),
    (U_SPA | {"e_spa.uniform": 0.1}, {"e_spa.uniform": 0.5}),
    (SKIPS | {"placement": "sub"}, {"placement": "pre"}),
    (SKIPS | {"activation": "gelu"}, {"activation": "shaped_relu"}),
    ({"attention.shaping": "espa"}, {"stream": "skipless", "init": "orthogonal"}),
    ({"init": "orthogonal"}, {"init": "fan_in"}),
    (E_SPA | {"placement": "sub"}, {"placement": "pre"}),
    (E_SPA | {"attention.position": "alibi"}, {"attention.position": "rope"}),
    (E_SPA | {"attention.qk_norm": True}, {"attention.qk_norm": False}),
    ({"method": "magneto_sigma", "sigma.gamma": "one"}, {"sigma.gamma": "spectral"}),
    (E_SPA | {"reparam": "sigma"}, {"reparam": "none"}),
    ({"activation": "tailored"}, {"init": "unit"}),
    ({"init": "completep", "stream": "concat"}, {"init": "unit"}),
    (E_SPA | {"attention.value_residual": True}, {"attention.value_residual": False}),
    (E_SPA | {"activation": "swiglu"}, {"placement": "pre"}),
    ({"stream": "keel"}, {"placement": "keel"}),
    ({"stream": "admin"}, {"placement": "post"}),
    ({"stream": "dual"}, {"placement": "post_final"}),
    (E_SPA | {"attention.gate": "headwise"}, {"attention.gate": "none"}),
    (E_SPA | {"attention.softmax": "sink"}, {"attention.softmax": "standard"}),
    ({"stream": "balanced", "placement": "post"}, {"placement": "none"}),
    ({"stream": "simplified"}, {"attention.shaping": "shaped"}),
    (SAS | {"placement": "post"}, {"placement": "pre"}),
    (SAS | {"init": "unit"}, {"init": "fan_in"}),
    (SAS | {"attention.qk_norm": True}, {"attention.qk_norm": False}),
    (SAS | {"stream": "concat"}, {"attention.value_maps": True}),
    ({"method": "shaped_attention", "stream": "simplified", "init": "unit"}, {"init": "fan_in"}),
    ({"method": "muddformer", "attention.gate": "headwise"}, {"attention.gate": "none"}),
    ({"method": "muddformer", "attention.value_maps": False}, {"attention.value_maps": True}),
    ({"method": "ngpt", "init": "xavier"}, {"init": "unit_length"}),
    ({"norm": "unit", "placement": "sub"}, {"norm": "rmsnorm"}),
    ({"method": "catformer", "norm": "unit"}, {"norm": "rmsnorm"}),
    ({"method": "ngpt", "attention.low_rank": 0.5}, {"attention.low_rank": 0}),
    ({"method": "ngpt", "attention.qk_norm": True}, {"attention.qk_norm": False}),
    ({"method": "ngpt", "tie_embeddings": True}, {"tie_embeddings": False}),
    ({"norm": "crmsnorm", "placement": "peri"}, {"norm": "rmsnorm"}),
    ({"method": "catformer", "norm": "crmsnorm"}, {"norm": "rmsnorm"}),
    ({"method": "looped", "attention.value_residual": True}, {"attention.value_residual": False}),
    (E_SPA | {"stack": "cycle"}, {"stack": "plain"}),
    ({"method": "layernorm_scaling", "stack": "cycle"}, {"placement": "pre"}),
    ({"method": "denseformer", "stack": "cycle"}, {"stream": "residual"}),
    ({"method": "catformer", "depth_drop": "linear_decay"}, {"stream": "residual"}),
    (E_SPA | {"depth_drop": "linear_decay"}, {"depth_drop": "none"}),
]


def _refused(keys: dict[str, Any]) -> list[Refusal]:
    """The refusals whose reasons the user is given."""
    try:
        _resolved(keys)
    except ConfigError as error:
        model = load([], [f"model.{key}={str(value).lower()}" for key, value in (TINY | keys).items()]).config.model
        return [refusal for refusal in refusals(catalogue.apply_method(model)) if refusal.reason in str(error)]
    return []


@pytest.mark.parametrize(("keys", "mend"), EXAMPLES, ids=lambda keys: "-".join(f"{k}={v}" for k, v in keys.items()))
def test_a_refusal_reaches_the_user_with_keys_values_origin_and_a_mend(keys, mend):
    with pytest.raises(ConfigError) as caught:
        _resolved(keys)
    told = str(caught.value)
    (refusal,) = _refused(keys)
    assert told.count("\n") == 0
    assert all(f"{key}=" in told for key in refusal.keys)
    assert all(f"argument model.{key}={str(value).lower()}" in told for key, value in keys.items())
    assert "; use " in told
    _resolved(keys | mend)


def test_every_reason_has_an_example():
    assert {refusal.reason for keys, _ in EXAMPLES for refusal in _refused(keys)} == every_reason()


def test_no_catalogued_method_breaks_a_rule():
    for name in METHODS:
        assert catalogue.problems(_resolved({"method": name}).model) == [], name


# Few points of the whole space are legal; most of those near a legal one are.
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(COVER.cases),
    st.fixed_dictionaries({}, optional={axis: st.sampled_from(values) for axis, values in AXES.items()}),
    st.integers(1, 3),
    st.integers(1, SEQ_LEN),
)
def test_any_combination_is_refused_or_gives_a_finite_loss(case, changes, n_layers, seq_len):
    case = case | changes
    keys = _keys(case) | {"n_layers": n_layers}
    if _forbidden(case):
        assert _refused(keys)
        return
    model = _resolved(keys).model
    decoder = Decoder(model, "fp32")
    initialise(decoder, model, 0)
    tokens, targets = (part[:, :seq_len] for part in _batch())
    sums = decoder(tokens, targets)
    assert math.isfinite(sums.total.item())
    assert int(sums.valid) == tokens.numel()
