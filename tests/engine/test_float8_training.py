"""Training in 8-bit products: which matrices, recompute, compilation, engines, and what is refused."""

import pytest
import torch
from matrix import configuration, launch, make_ranks, run_steps, single, train_kinds, worst

from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import check_float8
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS
from stablelm.methods.sizes import fits_float8, products
from stablelm.model.linear import Linear

ALONE = make_ranks(0, 1)
BF16 = ("train.precision=bf16", "model.n_layers=3", "model.method=magneto_sigma")
RECIPES = ("tensorwise", "rowwise")


WIDTHS = ("model.catformer.growth=16", "model.catformer.d_attention=32", "model.d_ff=64")
"""Divisible by 16, which those that Catformer finds are not."""


def of(method: str) -> tuple[str, ...]:
    return (f"model.method={method}", *(WIDTHS if method.startswith("catformer") else ()))


def float8(recipe: str, least: int = 16) -> tuple[str, ...]:
    return (*BF16, f"train.float8={recipe}", f"train.float8_min_width={least}")


def maps_of(engine: TorchEngine) -> dict[str, str | None]:
    """The recipe of each map, by name."""
    return {name: part.float8 for name, part in engine.module.named_modules() if isinstance(part, Linear)}


@pytest.mark.parametrize("method", METHODS)
def test_the_matrices_are_those_whose_products_are_wide(method: str):
    config = configuration(*float8("rowwise", 48), *of(method), "model.d_model=64")
    engine = TorchEngine(config, "single", ALONE)
    wide = [
        rows
        for sublayer in range(2 * len(engine.module.layers))
        for d_in, sides in products(config.model, sublayer)
        for rows in sides
        if fits_float8(d_in, sides, 48)
    ]
    found = [len(engine.module.get_parameter(f"{name}.weight")) for name, recipe in maps_of(engine).items() if recipe]
    assert sorted(found) == sorted(wide) and wide


def test_the_head_stays_as_it_is_and_so_does_a_model_that_is_not_trained():
    engine = TorchEngine(configuration(*float8("tensorwise")), "single", ALONE)
    assert {name for name, recipe in maps_of(engine).items() if recipe is None} == {"head"}
    evaluated = TorchEngine(configuration(*float8("tensorwise")), "single", ALONE, train=False)
    assert set(maps_of(evaluated).values()) == {None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_near_those_of_bf16(recipe: str):
    assert 1e-6 < worst(single(*float8(recipe), steps=6), single(*BF16, steps=6)) < 5e-3


@pytest.mark.parametrize("mode", ["attention", "selective", "full"])
@pytest.mark.parametrize("method", ["magneto_sigma", "catformer"])
def test_recompute_changes_nothing(method: str, mode: str):
    config = configuration(*float8("tensorwise"), *of(method))
    again = configuration(*float8("tensorwise"), *of(method), f"engine.recompute={mode}")
    first, second = (build_engine(each, "single", ALONE) for each in (config, again))
    assert run_steps(first, ALONE, config, 1, 2) == run_steps(second, ALONE, again, 1, 2)
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, first.tensors()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled(recipe: str):
    more = ("engine.recompute=every:2",)
    found = single(*float8(recipe), *more, "train.compile=true", steps=4)
    assert (
        worst(found, single(*float8(recipe), *more, steps=4)) < 4e-3
    )  # a value that rounds the other way moves by an eighth


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_engines(recipe: str):
    found = launch(train_kinds, 2, ["ddp", "fsdp2"], [*float8(recipe)], 4)
    expected = single(*float8(recipe), steps=4)
    assert all(worst(losses, expected) < 2e-3 for losses in found.values()), found


def test_a_gpu_without_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    check_float8("none", device)
    check_float8("rowwise", torch.device("cpu"))
    with pytest.raises(ConfigError) as refusal:
        check_float8("rowwise", device)
    assert str(refusal.value) == (
        "train.float8=rowwise needs an NVIDIA GPU of compute capability 8.9 or newer, which NVIDIA A100-SXM4-80GB "
        "(8.0) is not; set train.float8=none"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    check_float8("rowwise", device)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("train.precision=fp32",), "train.float8=rowwise takes the place of bf16 products, and train.precision=fp32"),
        (("engine.kind=zero2",), "train.float8=rowwise is not possible under engine.kind=zero2; use fsdp2"),
        (
            ("train.float8_min_width=2048",),
            "no matrix of the layers has sides divisible by 16 and of at least train.float8_min_width=2048; set "
            "train.float8_min_width=32 or less, or leave",
        ),
        (("model.d_model=36", "model.n_heads=2", "model.d_ff=40"), "use other widths, or leave train.float8 out"),
        (("model.method=catformer",), "use other widths, or leave train.float8 out"),
        (("train.float8_min_width=0",), "train.float8_min_width=0 must be at least 1"),
    ],
)
def test_contradictions(given: tuple[str, ...], sentence: str):
    with pytest.raises(ConfigError) as refusal:
        configuration(*float8("rowwise"), *given)
    assert sentence in str(refusal.value)
