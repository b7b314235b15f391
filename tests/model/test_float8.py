"""Products of 8-bit numbers: against float64, against torchao's own layers, and side by side with factors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.sigma import gaussian, make_linear
from torch import Tensor, nn

from stablelm.model import float8
from stablelm.model.linear import Linear, make_dtypes, side_by_side

RECIPES = sorted(float8.RECIPES)
ERRORS = {"tensorwise": 0.08, "rowwise": 0.06}
"""Relative, of products of normal numbers: factors rounded to 3 bits of mantissa, or with tensorwise gradients to 2."""


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def drawn(tokens: int = 48, d_in: int = 64, d_out: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a matrix and the gradient of the product, in bf16."""
    parts = ((tokens, d_in), (d_out, d_in), (tokens, d_out))
    x, matrix, gradient = (gaussian(*shape, seed=seed).bfloat16() for seed, shape in enumerate(parts))
    return x.requires_grad_(), matrix.requires_grad_(), gradient


def passes(x: Tensor, matrix: Tensor, gradient: Tensor, recipe: str | None) -> list[Tensor]:
    product = float8.linear(x, matrix, None, recipe)
    return [product.detach(), *torch.autograd.grad(product, (x, matrix), gradient)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [48, 5])
def test_a_product_and_its_gradients_are_those_of_float64_to_8_bits(recipe: str, tokens: int):
    x, matrix, gradient = drawn(tokens)
    exact = [x.double() @ matrix.double().t(), gradient.double() @ matrix.double(), gradient.double().t() @ x.double()]
    for found, wanted in zip(passes(x, matrix, gradient, recipe), exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        assert 0.01 < apart(found, wanted) < ERRORS[recipe]  # a product in bf16 is within 0.005


@pytest.mark.parametrize("recipe", RECIPES)
def test_they_are_those_of_torchaos_layer(recipe: str):
    torchao = pytest.importorskip("torchao.float8")
    x, matrix, gradient = drawn()
    layer = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(matrix.detach())
    emulated = replace(torchao.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    [theirs] = torchao.convert_to_float8_training(nn.Sequential(layer), config=emulated)
    product = theirs(x)
    wanted = [product.detach(), *torch.autograd.grad(product, (x, theirs.weight), gradient)]
    for found, other in zip(passes(x, matrix, gradient, recipe), wanted, strict=True):
        assert apart(found, other) < 0.005


def test_rows_of_their_own_scale_keep_the_small_ones():
    x, matrix, gradient = drawn()
    scales = torch.logspace(-6, 0, len(x))[:, None].bfloat16()
    small, exact = (x.detach() * scales).requires_grad_(), (x.double() * scales.double()) @ matrix.double().t()
    first = {recipe: passes(small, matrix, gradient, recipe)[0][:8] for recipe in RECIPES}
    assert apart(first["rowwise"], exact[:8]) < ERRORS["rowwise"]
    assert apart(first["tensorwise"], exact[:8]) > 0.5


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(recipe: str, value: float):
    x, matrix, gradient = drawn()
    with torch.no_grad():
        x[0, 0] = value
    assert not passes(x, matrix, gradient, recipe)[0][0].isfinite().any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_and_tiny_numbers(recipe: str):
    x, matrix, gradient = drawn()
    assert not any(float(part.abs().max()) for part in passes(x, matrix, 0 * gradient, recipe)[1:])
    tiny, whole = passes(x, matrix, gradient * 2.0**-100, recipe)[1:], passes(x, matrix, gradient, recipe)[1:]
    assert all(apart(small * 2.0**100, part) < 0.005 for small, part in zip(tiny, whole, strict=True))


def maps_of(kind: str) -> list[Linear]:
    """Three maps of bf16 products, their weights fp32."""
    if kind == "sigma":
        return [make_linear(d_out, 64, precision="bf16", gamma=0.5 + d_out / 64) for d_out in (32, 16, 16)]
    dtypes = make_dtypes("bf16", "fp32")
    made = [Linear(64, d_out, bias=True, dtypes=dtypes) for d_out in (32, 16, 16)]
    with torch.no_grad():
        for seed, parameter in enumerate(parameter for part in made for parameter in part.parameters()):
            parameter.copy_(gaussian(*parameter.shape, seed=seed))
    return made


def gradients_of(maps: list[Linear], recipe: str | None) -> list[Tensor]:
    for part in maps:
        part.float8 = recipe
    x = gaussian(3, 16, 64, seed=9).requires_grad_()
    leaves: list[Any] = [x, *(parameter for part in maps for parameter in part.parameters())]
    product = side_by_side(maps, x)
    gradient = gaussian(*product.shape, seed=10).to(product.dtype)
    return [product.detach(), *torch.autograd.grad(product, leaves, gradient)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["plain", "sigma"])
def test_maps_side_by_side_have_their_factors_and_biases(kind: str, recipe: str):
    maps = maps_of(kind)
    found, wanted = gradients_of(maps, recipe), gradients_of(maps, None)
    for part, exact in zip(found, wanted, strict=True):
        assert part.dtype == exact.dtype
        assert apart(part, exact) < 0.15
    assert apart(found[1], wanted[1]) > 0.01


def test_passes_without_gradients_are_in_bf16():
    maps, x = maps_of("plain"), gaussian(4, 64, seed=9)
    with torch.no_grad():
        exact = side_by_side(maps, x)
        for part in maps:
            part.float8 = "tensorwise"
        assert torch.equal(side_by_side(maps, x), exact)
