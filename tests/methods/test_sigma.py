"""Sigma reparametrisation: the map against its equation, gains, targets, and the entropy that it bounds."""

import pytest
import torch
from support.bodies import first_products
from support.sigma import gaussian, make_linear, make_matrix, spectral_norm
from torch import Tensor
from torch.func import functional_call

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods import spectral
from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.linear import Linear, derive
from stablelm.observe.layer_hooks import attention_figures
from stablelm.theory.rows import entropy_bound

SIZES = ("model.n_layers=3", "model.d_model=32", "model.n_heads=4", "data.seq_len=24", "train.steps=5")


def _config(method: str, *overrides: str) -> ModelConfig:
    config = load([], [f"model.method={method}", *SIZES, *overrides]).config
    return resolve(config, pieces=200, world_size=1, accelerate_precision=None).model


def _decoder(config: ModelConfig, precision: str = "fp32") -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, 0)
    return decoder


def _tokens(seed: int = 0) -> Tensor:
    return torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(seed))


# The map against its equation.


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-13), ("fp32", 1e-6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_the_map_and_its_gradients_equal_the_equation(shape, bias, precision, tolerance):
    """y = x (gamma / sigma W)^T + b, sigma = v^T W u with u, v constant (Zhai et al. 2023, eq. 1)."""
    linear = make_linear(*shape, precision=precision, bias=bias)
    dtype = linear.weight.dtype
    x, back = gaussian(3, 5, shape[1], seed=4, std=1).to(dtype), gaussian(3, 5, shape[0], seed=5, std=1).to(dtype)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in linear.named_parameters()}
    sigma = (linear.v[:, None] * w["weight"] * linear.u[None, :]).sum()
    wanted = theirs @ (w["gamma"] / sigma * w["weight"]).T + w.get("bias", 0.0)
    found = linear(ours)
    found.backward(back)
    wanted.backward(back)
    pairs = {"y": (found, wanted), "x": (ours.grad, theirs.grad)}
    pairs |= {name: (parameter.grad, w[name].grad) for name, parameter in linear.named_parameters()}
    assert pairs.keys() == {"y", "x", "weight", "gamma"} | ({"bias"} if bias else set())
    for name, (mine, plain) in pairs.items():
        assert mine is not None and plain is not None
        assert (mine - plain).norm() <= tolerance * plain.norm(), name


def test_gradients_in_closed_form():
    """With G = dL/dW_hat: dL/dgamma = <G, W> / sigma, dL/dW = gamma / sigma (G - <G, W> / sigma v u^T)."""
    linear = make_linear(24, 16)
    assert linear.gamma is not None
    x, back = gaussian(7, 16, seed=4, std=1), gaussian(7, 24, seed=5, std=1)
    linear(x).backward(back)
    weight, gamma = linear.weight.detach(), linear.gamma.detach()
    sigma, g = linear.v @ weight @ linear.u, back.T @ x
    torch.testing.assert_close(linear.gamma.grad, ((g * weight).sum() / sigma)[None], rtol=1e-12, atol=0)
    wanted = gamma / sigma * (g - (g * weight).sum() / sigma * torch.outer(linear.v, linear.u))
    torch.testing.assert_close(linear.weight.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_the_gradient_is_orthogonal_to_the_weight(precision, tolerance):
    linear = make_linear(48, 32, precision=precision)
    x = gaussian(9, 32, seed=4, std=1).to(linear.weight.dtype)
    (linear(x) ** 3).sum().backward()
    gradient = linear.weight.grad
    assert gradient is not None
    assert (gradient * linear.weight).sum().abs() <= tolerance * gradient.norm() * linear.weight.norm()


def test_gradcheck_with_constant_vectors():
    linear = make_linear(4, 5)

    def function(x: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
        sigma = (linear.v @ weight.detach() @ linear.u)[None]  # of the weights that are tried
        return functional_call(linear, {"weight": weight, "gamma": gamma, "bias": bias, "sigma": sigma}, (x,))

    x = gaussian(3, 5, seed=4, std=1)
    inputs = [x, *(parameter.detach().clone() for parameter in (linear.weight, linear.gamma, linear.bias))]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_the_size_of_the_weight_does_not_matter():
    linear, x = make_linear(24, 16, precision="fp32"), gaussian(7, 16, std=1).float()
    before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(7)
    derive(linear)
    torch.testing.assert_close(linear(x), before, rtol=1e-5, atol=1e-6)


def test_bf16_multiplies_in_bf16_and_takes_the_scale_in_fp32():
    linear, x = make_linear(64, 48, precision="bf16"), gaussian(5, 48, std=1).bfloat16()
    assert linear.gamma is not None and linear.bias is not None
    scale = linear.gamma / torch.linalg.vector_norm(linear.weight.T @ linear.v)
    assert scale.dtype == torch.float32
    wanted = torch.nn.functional.linear(x, (linear.weight * scale).bfloat16(), linear.bias.bfloat16())
    assert torch.equal(linear(x), wanted)
    start = spectral.start(linear.weight.detach())
    linear.u.copy_(start.u)
    linear.v.copy_(start.v)
    derive(linear)
    assert linear.sigma.item() == pytest.approx(spectral_norm(linear.weight.bfloat16()), rel=1e-3)


# What does and what does not move u and v.


def test_passes_do_not_move_the_vectors_and_a_refresh_does():
    linear, x = make_linear(24, 16), gaussian(7, 16, std=1)
    u, v = linear.u.clone(), linear.v.clone()
    for training in (True, False):
        linear.train(training)
        outputs = [linear(x) for _ in range(10)]
        outputs[0].sum().backward()
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert torch.equal(linear.u, u) and torch.equal(linear.v, v)
    spectral.refresh([make_matrix(linear)])
    weight = linear.weight.detach()
    left = weight @ u
    torch.testing.assert_close(linear.v, left / left.norm(), rtol=1e-14, atol=1e-15)
    right = weight.T @ linear.v
    torch.testing.assert_close(linear.u, right / right.norm(), rtol=1e-14, atol=1e-15)
    assert not torch.equal(linear.u, u)


def test_state_holds_everything_once():
    decoder = _decoder(_config("sigma_reparam"))
    state = decoder.state_dict()
    leaves = {"weight", "gamma", "u", "v"}
    assert {key.split(".")[-1] for key in state if "body.query" in key} == leaves
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    matrices = [part for part in decoder.layers.modules() if isinstance(part, Linear)]
    with torch.no_grad():
        for part in matrices:
            part.weight.add_(0.01)
    spectral.refresh([make_matrix(part) for part in matrices])
    other = Decoder(decoder.config, "fp32")
    other.load_state_dict(decoder.state_dict())
    with torch.device("meta"):
        third = Decoder(decoder.config, "fp32")
    third.load_state_dict(decoder.state_dict(), assign=True)
    for loaded in (other, third):
        assert torch.equal(loaded(_tokens()), decoder(_tokens()))


@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_each_matrix_has_a_gain_of_its_own(kind):
    decoder = _decoder(_config("sigma_reparam"), "fp64")
    attention = decoder.get_submodule("layers.0.attention.body")
    assert isinstance(attention, Attention)
    x = gaussian(1, 4, 32, std=1)
    before = [linear(x) for linear in attention.first_maps]
    with torch.no_grad():
        decoder.get_parameter(f"layers.0.attention.body.{kind}.gamma").mul_(2)
    for name, linear, old in zip(("query", "key", "value"), attention.first_maps, before, strict=True):
        torch.testing.assert_close(linear(x), old * (2 if name == kind else 1), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        ("sigma_reparam", "pre_ln"),
        ("magneto_sigma", "magneto"),
        ("deepscalelm_sigma", "deepscalelm_pre"),
        ("catformer_sigma", "catformer"),
    ],
)
def test_a_gain_of_the_spectral_norm_keeps_the_function_at_the_start(method, plain):
    # Gains make a shape of its own for catformer: the same widths for both.
    widths = ("model.catformer.growth=8", "model.catformer.d_attention=32", "model.d_ff=64")
    ours, theirs = (_decoder(_config(name, *widths)) for name in (method, plain))
    torch.testing.assert_close(ours(_tokens()), theirs(_tokens()), rtol=1e-5, atol=1e-5)
    for linear in (part for part in ours.layers.modules() if isinstance(part, Linear)):
        assert linear.gamma is not None
        assert linear.gamma.item() == pytest.approx(spectral_norm(linear.weight), rel=1e-5)


def test_a_gain_of_one_gives_unit_spectral_norms():
    decoder = _decoder(_config("sigma_reparam", "model.sigma.gamma=one"))
    for linear in (part for part in decoder.layers.modules() if isinstance(part, Linear)):
        with torch.no_grad():
            effective = linear(torch.eye(linear.weight.shape[1]))
        assert spectral_norm(effective) == pytest.approx(1, abs=1e-4)


def test_a_gain_of_one_with_sized_weights_is_refused():
    with pytest.raises(ConfigError, match=r"model\.sigma\.gamma=one with model\.init=magneto"):
        _config("magneto_sigma", "model.sigma.gamma=one")


def test_targets_attention_leaves_the_feedforward_plain():
    decoder = _decoder(_config("sigma_reparam", "model.sigma.targets=attention"))
    names = {name.rsplit(".", 1)[0].split(".")[-1] for name, _ in decoder.named_buffers()}
    assert names == {"query", "key", "value", "output"}


# Entropy of the attention that it bounds.


def test_attention_rows_lie_above_the_bound_and_larger_queries_lower_the_entropy():
    """Theorem 3.1 of Zhai et al. 2023 on the logits of the model, row by row."""
    decoder = _decoder(_config("sigma_reparam", "model.attention.position=none"), "fp64")
    attention = decoder.get_submodule("layers.0.attention.body")
    assert isinstance(attention, Attention)
    x, positions, entropies = gaussian(1, 24, 32, std=1), Positions(), []
    for gain in (1.0, 10.0):
        products = first_products(attention, x, gain)
        logits = attention.logits(*attention.queries_and_keys(products, positions), positions)[0].detach()
        assert logits.shape == (4, 24, 24)  # (heads, queries, keys)
        weights = logits.softmax(dim=-1)
        for row in range(24):
            visible = logits[:, row, : row + 1]
            entropy = -torch.special.xlogy(weights[:, row], weights[:, row]).sum(dim=-1)
            spread = (visible - visible.mean(dim=-1, keepdim=True)).norm(dim=-1)
            assert (entropy.numpy() >= entropy_bound(spread.numpy(), row + 1) - 1e-9).all()
        figures = attention_figures(attention, products, positions)
        entropies.append(figures["attention_entropy"].item())
    assert entropies[1] < 0.8 * entropies[0]
