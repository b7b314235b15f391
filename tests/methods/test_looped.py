"""Layers that run at several places: the same function and gradients as copies of them have, counts, figures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.parity import assert_parity

from stablelm.checkpoint.contents import expected_shapes
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.observe.layers import Recorder
from stablelm.probe.predict import predict

SIZES = ("model.d_model=32", "model.n_heads=4", "data.seq_len=12", "train.steps=9")
PLACES = {
    ("cycle", 2, 6): [0, 1, 2, 0, 1, 2],
    ("sequence", 2, 6): [0, 0, 1, 1, 2, 2],
    ("cycle", 4, 4): [0, 0, 0, 0],
    ("cycle", 3, 5): [0, 1, 0, 1, 0],
    ("sequence", 3, 5): [0, 0, 0, 1, 1],
}


def config(*overrides: str) -> Config:
    found = load([], [*SIZES, *overrides])
    return resolve(found.config, pieces=64, world_size=1, accelerate_precision=None)


def shared(order: str, repeats: int, layers: int, *overrides: str) -> ModelConfig:
    stack = (f"model.stack={order}", f"model.shared.repeats={repeats}", f"model.n_layers={layers}")
    return config(*stack, *overrides).model


def built(model: ModelConfig) -> Decoder:
    decoder = Decoder(model, "fp64")
    initialise(decoder, model, 0)
    return decoder


def some_text() -> torch.Tensor:
    return torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", PLACES)
def test_a_shared_layer_is_its_copies_and_its_gradient_their_sum(case, record_property):
    model = shared(*case, "model.method=deepscalelm_pre")
    decoder, copies = built(model), Decoder(model.axes.stack.unshared(model), "fp64")
    assert decoder.places == PLACES[case]
    assert len(decoder.layers) == len(set(PLACES[case]))
    weights = decoder.state_dict()
    for place, layer in enumerate(decoder.places):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        copies.layers[place].load_state_dict(own)
    copies.load_state_dict({name: value for name, value in weights.items() if "layers." not in name}, strict=False)
    text, totals = some_text(), list[torch.Tensor]()
    for each in (decoder, copies):
        sums: Any = each(text[:, :-1], text[:, 1:])
        sums.total.backward()
        totals.append(sums.total.detach())
    of_copies, gradients = {name: p.grad for name, p in copies.named_parameters()}, {}
    for name, parameter in decoder.named_parameters():
        wanted: Any = of_copies[name] if "layers." not in name else 0
        if "layers." in name:
            _, layer, rest = name.split(".", 2)
            places = [place for place, own in enumerate(decoder.places) if own == int(layer)]
            of_places: list[Any] = [of_copies[f"layers.{place}.{rest}"] for place in places]
            wanted = sum(of_places)
        gradients[name] = parameter.grad, wanted
    assert_parity(record_property, "looped", (totals[0], totals[1]), gradients)


@pytest.mark.parametrize("case", PLACES)
def test_parameters_count_once_and_operations_at_each_place(case):
    model = shared(*case)
    whole = model.axes.stack.unshared(model)
    counts = parameter_counts(model)
    assert counts["total"] == sum(p.numel() for p in built(model).parameters())
    assert counts["matmul"] == parameter_counts(whole)["matmul"]
    assert flops_per_token(model, 12) == flops_per_token(whole, 12)
    layers = {name.split(".")[2] for name in expected_shapes(model, optimizer=False) if ".layers." in name}
    assert layers == {str(layer) for layer in PLACES[case]}


def test_a_solved_layer_has_the_std_of_its_first_place():
    model = shared("sequence", 2, 6, "model.method=deepscalelm_pre")
    whole = model.axes.stack.unshared(model)
    name = "attention.body.output.weight"
    shared_std = [float(layer.get_parameter(name).std()) for layer in built(model).layers]
    own = [float(layer.get_parameter(name).std()) for layer in built(whole).layers]
    np.testing.assert_allclose(shared_std, own[::2], rtol=0.05)


def test_every_place_has_its_figures_and_the_theory_none():
    model = shared("cycle", 2, 6)
    decoder, text = built(model), some_text()
    with Recorder(decoder) as recorder:
        sums: Any = decoder(text[:, :-1], text[:, 1:])
        sums.total.backward()
        rows = recorder.rows()
    assert len(rows) == len(recorder.gradients) == 7
    assert all(float(norm) > 0 for norm in recorder.gradients)
    entropies = [float(row["attention_entropy"]) for row in rows[1:]]
    assert len(set(entropies)) == 6  # a pass of the same layer is another pass
    assert np.isnan(predict(model, seq_len=12).stream_variance).all()


@pytest.mark.parametrize(
    ("overrides", "fix"),
    [
        (("model.method=catformer",), "model.stream=residual"),
        (("model.method=denseformer",), "model.stream=residual"),
        (("model.method=deepscalelm_pre", "model.deepscale.norm_eps=shrinking"), "leave the eps alone"),
        (("model.method=layernorm_scaling",), "model.placement=pre"),
        (("model.method=value_residual",), "model.attention.value_residual=false"),
        (("model.method=e_spa",), "model.attention.shaping=none"),
    ],
)
def test_what_differs_between_places_is_refused(overrides, fix):
    with pytest.raises(ConfigError, match=fix):
        config("model.stack=cycle", "model.n_layers=4", *overrides)


def test_a_method_by_name():
    assert config("model.method=looped").model == replace(config("model.stack=cycle").model, method="looped")
