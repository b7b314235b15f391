"""Layers left out at random: what is left is the model without them, draws repeat, sizes on average."""

from typing import Any

import numpy as np
import pytest
import torch
from support.parity import assert_parity

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.linear import make_dtypes
from stablelm.observe.layers import Recorder
from stablelm.probe.predict import predict

FP64 = make_dtypes("fp64", "fp32")
SIZES = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "data.seq_len=12", "train.steps=9")


def resolved(*overrides: str) -> ModelConfig:
    found = load([], [*SIZES, *overrides])
    return resolve(found.config, pieces=64, world_size=1, accelerate_precision=None).model


def built(model: ModelConfig) -> Decoder:
    decoder = Decoder(model, "fp64")
    initialise(decoder, model, 0)
    return decoder


def some_text() -> torch.Tensor:
    return torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))


def factors(decoder: Decoder, *what: int) -> torch.Tensor:
    found = decoder.branch_factors(*what)
    assert found is not None
    return found


def test_what_is_left_out_is_not_there_and_has_no_gradient(record_property):
    decoder, plain, text = built(resolved("model.method=layer_drop")), built(resolved("model.n_layers=2")), some_text()
    names = {f"layers.{short}.": f"layers.{long}." for short, long in ((0, 1), (1, 3))}
    weights = decoder.state_dict()
    plain.load_state_dict({name: weights[names.get(name[:9], name[:9]) + name[9:]] for name in plain.state_dict()})
    kept = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    sums: Any = decoder(text[:, :-1], text[:, 1:], factors=kept)
    sums.total.backward()
    wanted: Any = plain(text[:, :-1], text[:, 1:])
    wanted.total.backward()
    theirs = {names.get(name[:9], name[:9]) + name[9:]: parameter.grad for name, parameter in plain.named_parameters()}
    gradients = {}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None  # so that every rank reduces the same
        assert (parameter.grad == 0).all() == name.startswith(("layers.0.", "layers.2.")), name
        if parameter.grad.any():
            gradients[name] = parameter.grad, theirs[name]
    assert_parity(record_property, "layer_drop", (sums.total, wanted.total), gradients)


def test_draws_follow_from_seed_step_and_layer():
    decoder = built(resolved("model.method=layer_drop", "model.drop.rate=0.5"))
    found = factors(decoder, 0, 7)
    assert torch.equal(found, factors(decoder, 0, 7))
    assert torch.equal(found[:, 0], found[:, 1])  # both branches of a layer
    others = [factors(decoder, 0, step) for step in range(16)]
    assert len({tuple(each[:, 0].tolist()) for each in others}) > 5
    assert not all(torch.equal(factors(decoder, 1, step), factors(decoder, 0, step)) for step in range(8))
    single = built(resolved("model.method=layer_drop", "model.drop.rate=0.5", "model.drop.unit=sublayer"))
    assert any(not torch.equal(each[:, 0], each[:, 1]) for each in (factors(single, 0, step) for step in range(8)))
    assert built(resolved()).branch_factors(0, 1) is None


@pytest.mark.parametrize(("kind", "survival"), [("uniform", [0.6] * 4), ("linear_decay", [0.9, 0.8, 0.7, 0.6])])
def test_survival_over_depth(kind, survival):
    decoder = built(resolved(f"model.depth_drop={kind}", "model.drop.rate=0.4", "model.drop.scale=none"))
    mean = torch.stack([factors(decoder, 3, step) for step in range(1500)]).mean(0)
    np.testing.assert_allclose(mean[:, 0], survival, atol=0.05)


def test_factors_of_training_and_evaluation():
    """survival 0.8 of the last layer: of the mean, of the mean square, of the function."""
    found = {}
    for scale in ("none", "evaluation", "training", "variance"):
        model = resolved("model.method=stochastic_depth", "model.drop.rate=0.2", f"model.drop.scale={scale}")
        drop = model.axes.depth_drop
        found[scale] = drop.trained(model, 7), drop.evaluated(model, 7), drop.root_mean_square(model, 7) ** 2
    assert found["none"] == pytest.approx((1, 1, 0.8))
    assert found["evaluation"] == pytest.approx((1, 0.8, 0.8))
    assert found["training"] == pytest.approx((1.25, 1, 1.25))
    assert found["variance"] == pytest.approx((0.8**-0.5, 1, 1))
    own = {method: resolved(f"model.method={method}") for method in ("layer_drop", "stochastic_depth")}
    assert own["layer_drop"].axes.depth_drop.evaluated(own["layer_drop"], 7) == 1
    assert own["stochastic_depth"].axes.depth_drop.evaluated(own["stochastic_depth"], 7) == pytest.approx(0.8)


def test_evaluation_multiplies_by_the_survival():
    model = resolved("model.method=stochastic_depth", "model.drop.rate=0.4")
    decoder, text = built(model).eval(), some_text()
    wanted = decoder(text, factors=torch.tensor([[s, s] for s in (0.9, 0.8, 0.7, 0.6)], dtype=torch.float64))
    torch.testing.assert_close(decoder(text), wanted, rtol=1e-14, atol=0)


def test_the_mean_over_draws_is_as_predicted():
    sizes = ("model.n_layers=8", "model.d_model=64", "model.drop.rate=0.4", "model.drop.scale=training")
    model = resolved("model.method=stochastic_depth", "model.norm=rmsnorm", "model.init=fan_in", *sizes)
    decoder, text = built(model), torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(1))
    draws = []
    with torch.no_grad():
        for step in range(60):
            with Recorder(decoder) as recorder:
                decoder(text, factors=factors(decoder, 0, step))
            draws.append([float(row["stream_variance"]) for row in recorder.rows()])
    predicted = predict(model, seq_len=32, collision=1 / 64).stream_variance
    np.testing.assert_allclose(np.mean(draws, axis=0) / predicted, 1, atol=0.25)


@pytest.mark.parametrize("method", ["catformer", "e_spa"])
def test_streams_that_need_every_branch_are_refused(method):
    with pytest.raises(ConfigError, match=r"model\.stream=residual"):
        resolved(f"model.method={method}", "model.depth_drop=uniform")
