"""Attention, rotary positions, norms, feed-forward and linear maps alone."""

import pytest
import torch
from plain_decoder import build, sample, small_config
from support.bodies import first_products
from torch import Tensor

from stablelm.methods.kernels import leaky_relu
from stablelm.methods.positions import rotate, rotation_table
from stablelm.methods.sizes import widths
from stablelm.model.feedforward import FeedForward
from stablelm.model.linear import Linear, make_dtypes
from stablelm.model.norms import Norm

CPU = torch.device("cpu")
FP64 = make_dtypes("fp64", "fp32")


def test_grouped_attention_equals_repeated_heads():
    grouped, full = build(small_config(kv_heads=2), "fp64"), build(small_config(kv_heads=4), "fp64")
    weights = {n: p.detach() for n, p in grouped.named_parameters()}
    for name, weight in weights.items():
        if ".key." in name or ".value." in name:
            heads = weight.unflatten(0, (2, -1))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    tokens, _ = sample(grouped.config)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d_head", [2, 8, 64])
def test_rotated_products_depend_on_the_distance_alone(d_head):
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, d_head, generator=generator, dtype=torch.float64)
    rotation = rotation_table(40, d_head, 10000.0, dtype=torch.float64, device=CPU)
    queries = rotate(query.expand(1, 40, 1, d_head), rotation)[0, :, 0]
    keys = rotate(key.expand(1, 40, 1, d_head), rotation)[0, :, 0]
    products = queries @ keys.T
    for distance in (0, 1, 7):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-10, atol=1e-10)
    assert (products[0, 0] - products[7, 0]).abs() > 1e-3
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(40))


def test_first_rotary_angle_is_the_position_itself():
    cos, sin = rotation_table(5, 6, 100.0, dtype=torch.float32, device=CPU)
    assert cos.shape == sin.shape == (5, 1, 3)
    torch.testing.assert_close(cos[:, 0, 0], torch.arange(5).float().cos())
    torch.testing.assert_close(sin[3, 0, 2], torch.tensor(3 * 100.0 ** (-4 / 6)).sin())


def test_rotation_of_bf16_is_computed_in_fp32():
    rotation = rotation_table(300, 16, 10000.0, dtype=torch.float32, device=CPU)
    x = torch.randn(1, 300, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(rotate(x, rotation), rotate(x.float(), rotation).bfloat16())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norm_of_a_bf16_stream_has_fp32_statistics(norm):
    config = small_config(norm=norm, bias=True)
    module = Norm(config, make_dtypes("bf16", "bf16"), 32)
    assert module.weight is not None
    torch.nn.init.ones_(module.weight)
    if module.bias is not None:
        torch.nn.init.zeros_(module.bias)
    assert (module.bias is not None) == (norm == "layernorm")
    # A large common part: bf16 sums would lose the rest.
    x = (100 + torch.randn(4, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    y = module(x)
    exact = x.double() - (x.double().mean(-1, keepdim=True) if norm == "layernorm" else 0)
    exact = exact / (exact.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    assert y.dtype == torch.bfloat16
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-5).all()  # rounded once
    assert module(x.float()).dtype == torch.float32
    torch.testing.assert_close(module(x.float()), exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_feedforward_forms(activation):
    config = small_config(activation=activation, d_model=32, d_ff=4)
    body = FeedForward(config, FP64, widths(config, 1), 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 3, 32, generator=generator, dtype=torch.float64)
    h = x @ body.fc1.weight.T
    if activation == "swiglu":
        g = x @ body.gate.weight.T
        h = g / (1 + (-g).exp()) * h
    elif activation == "gelu":
        h = h * torch.special.ndtr(h)
    else:
        h = h * (h > 0)
    products = first_products(body, x)
    torch.testing.assert_close(body(products), h @ body.fc2.weight.T)
    assert len(list(body.parameters())) == (3 if activation == "swiglu" else 2)


def test_linear_multiplies_in_bf16_and_keeps_fp32_weights():
    linear = Linear(64, 16, bias=True, dtypes=make_dtypes("bf16", "fp32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(5, 64, generator=generator, requires_grad=True)
    y = linear(x)
    assert linear.bias is not None
    rounded = x.bfloat16() @ linear.weight.bfloat16().T + linear.bias.bfloat16()
    torch.testing.assert_close(y, rounded, rtol=0.02, atol=0.05)
    y.sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert (y.dtype, x.grad.dtype, linear.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("precision", "stream", "expected"),
    [
        ("fp32", "bf16", (torch.float32, torch.float32, torch.float32)),
        ("bf16", "fp32", (torch.float32, torch.bfloat16, torch.float32)),
        ("bf16", "bf16", (torch.float32, torch.bfloat16, torch.bfloat16)),
        ("fp64", "fp32", (torch.float64, torch.float64, torch.float64)),
    ],
)
def test_dtypes_of_each_precision(precision, stream, expected):
    dtypes = make_dtypes(precision, stream)
    assert (dtypes.parameter, dtypes.compute, dtypes.stream) == expected


@pytest.mark.parametrize("method", ["deepscalelm_pre", "e_spa", "sas"])
def test_a_compiled_rectifier_keeps_no_mask(method):
    """What follows it is kept anyway and says where it was 0; a mask of bytes took a seventh of a step on a CPU."""
    config, kept = small_config(method), list[torch.dtype]()
    body = FeedForward(config, make_dtypes("bf16", "fp32"), widths(config, 1), 1)
    for parameter in body.parameters():
        torch.nn.init.normal_(parameter)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    x = torch.randn(2, 8, body.first_widths[0], dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        torch.compile(body)((x,)).sum().backward()
    assert kept and torch.bool not in kept


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
def test_the_leaky_relu_is_that_of_torch(slope):
    x, back = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, wanted = (x.clone().requires_grad_() for _ in range(2))
    leaky_relu(found, slope, 1.4).backward(back)
    (1.4 * torch.nn.functional.leaky_relu(wanted, slope)).backward(back)
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-14, atol=0)
    torch.testing.assert_close(leaky_relu(x, slope, 1.4), 1.4 * torch.nn.functional.leaky_relu(x, slope))
