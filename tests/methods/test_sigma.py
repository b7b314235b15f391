"""Sigma reparametrisation: the map against its equation, spectral norms at the start and as they are tracked."""

import math
import threading

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods import spectral
from stablelm.methods.initialise import initialise
from stablelm.model.attention import Attention
from stablelm.model.decoder import Decoder
from stablelm.model.linear import Linear, make_dtypes
from stablelm.observe.gauges import attention_figures
from stablelm.theory.entropy import entropy_bound

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


def _gaussian(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _norm(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.double())[0].item()


def _linear(d_out: int, d_in: int, *, precision: str = "fp64", bias: bool = True, gamma: float = 1.7) -> Linear:
    """Weights of known values whose u and v are a few iterations away from the singular vectors."""
    linear = Linear(d_in, d_out, bias=bias, dtypes=make_dtypes(precision, "fp32"), sigma=True)
    assert linear.gamma is not None
    weight = _gaussian(d_out, d_in)
    start = spectral.start(weight + 0.3 * _gaussian(d_out, d_in, seed=1))
    with torch.no_grad():
        for tensor, value in ((linear.weight, weight), (linear.u, start.u), (linear.v, start.v)):
            tensor.copy_(value)
        linear.gamma.fill_(gamma)
        if linear.bias is not None:
            linear.bias.copy_(_gaussian(d_out, seed=2))
    return linear


def _matrix(linear: Linear) -> spectral.Matrix:
    return spectral.Matrix(linear.weight.detach(), 0, linear.u, linear.v)


# The map against its equation.


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-13), ("fp32", 1e-6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_the_map_and_its_gradients_equal_the_equation(shape, bias, precision, tolerance):
    """y = x (gamma / sigma W)^T + b, sigma = v^T W u with u, v constant (Zhai et al. 2023, eq. 1)."""
    linear = _linear(*shape, precision=precision, bias=bias)
    dtype = linear.weight.dtype
    x, back = _gaussian(3, 5, shape[1], seed=4, std=1).to(dtype), _gaussian(3, 5, shape[0], seed=5, std=1).to(dtype)
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
    linear = _linear(24, 16)
    assert linear.gamma is not None
    x, back = _gaussian(7, 16, seed=4, std=1), _gaussian(7, 24, seed=5, std=1)
    linear(x).backward(back)
    weight, gamma = linear.weight.detach(), linear.gamma.detach()
    sigma, g = linear.v @ weight @ linear.u, back.T @ x
    torch.testing.assert_close(linear.gamma.grad, ((g * weight).sum() / sigma)[None], rtol=1e-12, atol=0)
    wanted = gamma / sigma * (g - (g * weight).sum() / sigma * torch.outer(linear.v, linear.u))
    torch.testing.assert_close(linear.weight.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
def test_the_gradient_is_orthogonal_to_the_weight(precision, tolerance):
    linear = _linear(48, 32, precision=precision)
    x = _gaussian(9, 32, seed=4, std=1).to(linear.weight.dtype)
    (linear(x) ** 3).sum().backward()
    gradient = linear.weight.grad
    assert gradient is not None
    assert (gradient * linear.weight).sum().abs() <= tolerance * gradient.norm() * linear.weight.norm()


def test_gradcheck_with_constant_vectors():
    linear = _linear(4, 5)

    def function(x: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor) -> Tensor:
        return functional_call(linear, {"weight": weight, "gamma": gamma, "bias": bias}, (x,))

    x = _gaussian(3, 5, seed=4, std=1)
    inputs = [x, *(parameter.detach().clone() for parameter in (linear.weight, linear.gamma, linear.bias))]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


def test_the_size_of_the_weight_does_not_matter():
    linear, x = _linear(24, 16, precision="fp32"), _gaussian(7, 16, std=1).float()
    before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(7)
    torch.testing.assert_close(linear(x), before, rtol=1e-5, atol=1e-6)


def test_bf16_multiplies_in_bf16_and_takes_the_scale_in_fp32():
    linear, x = _linear(64, 48, precision="bf16"), _gaussian(5, 48, std=1).bfloat16()
    assert linear.gamma is not None and linear.bias is not None
    product = x @ linear.weight.bfloat16().T
    scale = linear.gamma / torch.dot(linear.v, linear.weight @ linear.u)
    assert scale.dtype == torch.float32
    assert torch.equal(linear(x), product * scale.bfloat16() + linear.bias.bfloat16())
    start = spectral.start(linear.weight.detach())
    linear.u.copy_(start.u)
    linear.v.copy_(start.v)
    cast = _norm(linear.weight.bfloat16())
    assert spectral.estimates([_matrix(linear)]).item() == pytest.approx(cast, rel=1e-3)


# What does and what does not move u and v.


def test_passes_do_not_move_the_vectors_and_a_refresh_does():
    linear, x = _linear(24, 16), _gaussian(7, 16, std=1)
    u, v = linear.u.clone(), linear.v.clone()
    for training in (True, False):
        linear.train(training)
        outputs = [linear(x) for _ in range(10)]
        outputs[0].sum().backward()
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert torch.equal(linear.u, u) and torch.equal(linear.v, v)
    spectral.refresh([_matrix(linear)])
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
    spectral.refresh([_matrix(part) for part in matrices])
    other = Decoder(decoder.config, "fp32")
    other.load_state_dict(decoder.state_dict())
    assert torch.equal(other(_tokens()), decoder(_tokens()))


@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_each_matrix_has_a_gain_of_its_own(kind):
    decoder = _decoder(_config("sigma_reparam"), "fp64")
    attention = decoder.get_submodule("layers.0.attention.body")
    assert isinstance(attention, Attention)
    x = _gaussian(1, 4, 32, std=1)
    before = [linear(x) for linear in attention.first_maps]
    with torch.no_grad():
        decoder.get_parameter(f"layers.0.attention.body.{kind}.gamma").mul_(2)
    for name, linear, old in zip(("query", "key", "value"), attention.first_maps, before, strict=True):
        torch.testing.assert_close(linear(x), old * (2 if name == kind else 1), rtol=1e-12, atol=1e-15)


# The start.

SHAPES = [(256, 256), (768, 768), (3072, 768), (96, 300), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_start_is_the_top_of_the_svd(shape):
    weight = _gaussian(*shape)
    torch.manual_seed(5)  # the global generator plays no part
    start, again = spectral.start(weight.float()), spectral.start(weight.float())
    weight = weight.float().double()
    assert start.sigma == again.sigma and torch.equal(start.u, again.u) and torch.equal(start.v, again.v)
    assert start.sigma == pytest.approx(_norm(weight), rel=1e-7)
    assert (start.u.norm().item(), start.v.norm().item()) == pytest.approx((1, 1), abs=1e-12)
    assert (weight.T @ start.v - start.sigma * start.u).norm() <= 1e-4 * start.sigma
    assert (start.v @ weight @ start.u).item() == pytest.approx(start.sigma, rel=1e-7)
    if min(shape) >= 256:
        expected = 0.02 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        assert start.sigma == pytest.approx(expected, rel=0.02)


def test_starts_shared_out_over_ranks_sum_to_all_of_them():
    matrices = [_gaussian(rows, 20, seed=rows) for rows in (12, 30, 20, 8, 16)]
    ranks = [spectral.SharedStarts(rank, 3) for rank in range(3)]
    for matrix in matrices:
        parts, whole = [rank(matrix) for rank in ranks], spectral.start(matrix)
        assert sum(part.sigma > 0 for part in parts) == 1
        assert sum(part.sigma for part in parts) == whole.sigma
        assert torch.equal(sum(part.u for part in parts), whole.u)  # type: ignore[arg-type]
        assert torch.equal(sum(part.v for part in parts), whole.v)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [100, 400])
def test_the_start_of_special_matrices(size):
    rank_one = torch.outer(_gaussian(size, std=1), _gaussian(size, seed=1, std=1))
    assert spectral.start(rank_one).sigma == pytest.approx(_norm(rank_one), rel=1e-9)
    assert spectral.start(3.0 * torch.eye(size)).sigma == pytest.approx(3, rel=1e-9)
    with pytest.raises(ValueError, match="no direction of largest gain"):
        spectral.start(torch.zeros(size, size))


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
        assert linear.gamma.item() == pytest.approx(_norm(linear.weight), rel=1e-5)


def test_a_gain_of_one_gives_unit_spectral_norms():
    decoder = _decoder(_config("sigma_reparam", "model.sigma.gamma=one"))
    for linear in (part for part in decoder.layers.modules() if isinstance(part, Linear)):
        with torch.no_grad():
            effective = linear(torch.eye(linear.weight.shape[1]))
        assert _norm(effective) == pytest.approx(1, abs=1e-4)


def test_a_gain_of_one_with_sized_weights_is_refused():
    with pytest.raises(ConfigError, match=r"model\.sigma\.gamma=one with model\.init=magneto"):
        _config("magneto_sigma", "model.sigma.gamma=one")


def test_targets_attention_leaves_the_feedforward_plain():
    decoder = _decoder(_config("sigma_reparam", "model.sigma.targets=attention"))
    names = {name.rsplit(".", 1)[0].split(".")[-1] for name, _ in decoder.named_buffers()}
    assert names == {"query", "key", "value", "output"}


# Tracking.


@pytest.mark.parametrize(("lr", "shortfall"), [(3e-4, 1e-3), (1e-3, 2.5e-2)])
def test_one_refresh_a_step_follows_the_norm_from_below(lr, shortfall):
    """Sign steps with gradients of noise: the hardest case for one power iteration a step."""
    weight = _gaussian(256, 256).float()
    start = spectral.start(weight)
    matrix = spectral.Matrix(weight, 0, start.u.float(), start.v.float())
    generator, ratios = torch.Generator().manual_seed(1), [_norm(weight) / spectral.estimates([matrix]).item()]
    for step in range(1, 301):
        weight -= lr * torch.randn(256, 256, generator=generator).sign()
        spectral.refresh([matrix])
        if step % 30 == 0:
            ratios.append(_norm(weight) / spectral.estimates([matrix]).item())
    assert ratios[0] <= 1 + 1e-4
    assert min(ratios) >= 1 - 1e-5
    assert max(ratios) <= 1 + shortfall


def test_tracking_errors_tell_how_far_the_estimate_lies_below_and_change_nothing():
    matrices = [_matrix(_linear(24, 16)), _matrix(_linear(16, 40))]
    kept = [(matrix.u.clone(), matrix.v.clone()) for matrix in matrices]
    errors = spectral.tracking_errors(matrices, iterations=500)
    wanted = [1 - (m.v @ m.rows @ m.u).item() / _norm(m.rows) for m in matrices]
    assert min(wanted) > 1e-4
    assert errors.tolist() == pytest.approx(wanted, rel=1e-6)
    assert all(torch.equal(m.u, u) and torch.equal(m.v, v) for m, (u, v) in zip(matrices, kept, strict=True))


class _Ranks:
    """Threads that stand for ranks: a sum of flat tensors over all of them, counted."""

    def __init__(self, size: int):
        self.barrier, self.parts, self.calls = threading.Barrier(size), [torch.empty(0)] * size, 0

    def reduce(self, rank: int):
        def in_place(flat: Tensor) -> None:
            self.parts[rank] = flat.clone()
            self.calls += rank == 0
            self.barrier.wait(10)
            flat.copy_(torch.stack(self.parts).sum(dim=0))
            self.barrier.wait(10)

        return in_place

    def run(self, function, *each: list) -> list:
        results: list = [None] * len(self.parts)

        def one(rank: int) -> None:
            results[rank] = function(*(arguments[rank] for arguments in each), self.reduce(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.parametrize("splits", [(13, 11), (8, 8, 8), (20, 4, 0)], ids=str)
def test_a_refresh_of_shards_equals_that_of_the_whole_in_one_sum(splits):
    whole = [_matrix(_linear(24, 16)), _matrix(_linear(24, 40))]
    shards = []
    for rank in range(len(splits)):
        first = sum(splits[:rank])
        rows = slice(first, first + splits[rank])
        shards.append([spectral.Matrix(m.rows[rows], first, m.u.clone(), m.v.clone()) for m in whole])
    ranks = _Ranks(len(splits))
    ranks.run(spectral.refresh, shards)
    assert ranks.calls == 1
    spectral.refresh(whole)
    for rank, held in enumerate(shards):
        for one, other in zip(held, whole, strict=True):
            torch.testing.assert_close(one.u, other.u, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(one.v, other.v, rtol=1e-12, atol=1e-14)
            if 0 < splits[rank] < 20:
                assert _norm(one.rows) < 0.99 * (one.v @ other.rows @ one.u).item()  # a shard's own norm would not do
    for found in ranks.run(spectral.estimates, shards):
        torch.testing.assert_close(found, spectral.estimates(whole), rtol=1e-12, atol=0)


def test_nothing_to_refresh_asks_for_no_sum():
    spectral.refresh([], lambda flat: pytest.fail("no collective is needed"))


# Entropy of the attention that it bounds.


def test_attention_rows_lie_above_the_bound_and_larger_queries_lower_the_entropy():
    """Theorem 3.1 of Zhai et al. 2023 on the logits of the model, row by row."""
    decoder = _decoder(_config("sigma_reparam", "model.attention.position=none"), "fp64")
    attention = decoder.get_submodule("layers.0.attention.body")
    assert isinstance(attention, Attention)
    x, entropies = _gaussian(1, 24, 32, std=1), []
    for gain in (1.0, 10.0):
        products = tuple(linear(x) * (gain if i == 0 else 1) for i, linear in enumerate(attention.first_maps))
        logits = attention.logits(*attention.queries_and_keys(products, ()), ())[0].detach()  # (heads, seq, seq)
        assert logits.shape == (4, 24, 24)
        weights = logits.softmax(dim=-1)
        for row in range(24):
            visible = logits[:, row, : row + 1]
            entropy = -torch.special.xlogy(weights[:, row], weights[:, row]).sum(dim=-1)
            spread = (visible - visible.mean(dim=-1, keepdim=True)).norm(dim=-1)
            assert (entropy.numpy() >= entropy_bound(spread.numpy(), row + 1) - 1e-9).all()
        figures = attention_figures(attention, products, ())
        entropies.append(figures["attention_entropy"].item())
    assert entropies[1] < 0.8 * entropies[0]
