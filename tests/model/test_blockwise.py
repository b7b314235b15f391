"""Attention on a CPU by blocks of queries: the same as from whole matrices of logits, where it is taken, and how."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.model.attention import attention_kernels, blockwise
from stablelm.private_names import compilation_settings_kept, configure_compilation

SCALE = 0.3


def inputs(seq: int, heads: tuple[int, int] = (4, 4), *, batch: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    """Queries, keys and values as a layer gives them, and a gradient."""
    draw = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, n, 8) for n in (heads[0], heads[1], heads[1], heads[0])]
    made = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]
    return *(part.requires_grad_() for part in made[:3]), made[3]


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    after = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    return (query @ key.transpose(-1, -2) * scale).masked_fill(after, -torch.inf).softmax(dim=-1) @ value


def plain_with_null(query: Tensor, key: Tensor, value: Tensor, null: Tensor, scale: float) -> Tensor:
    """With one more key before all others, whose value is 0 and whose logit is `null`."""
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    after = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(after, -torch.inf)
    first = null.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat((first, logits), dim=-1).softmax(dim=-1)[..., 1:] @ value


def with_null(function: Callable[..., Tensor], given: Any) -> tuple[Tensor, ...]:
    """What it returns for null logits too, far apart, and its gradients."""
    *parts, gradient = given
    null = torch.linspace(-2, 30, parts[0].shape[1], dtype=torch.float64).requires_grad_()
    made = function(*parts, null)
    return made, *torch.autograd.grad(made, [*parts, null], gradient)


def by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Its operators, not compiled."""
    with torch.compiler.set_stance("force_eager"):
        return blockwise.causal_attention(query, key, value, scale)


def results(function: Callable[..., Tensor], given: Any) -> tuple[Tensor, ...]:
    """What it returns and its gradients."""
    *parts, gradient = given
    made = function(*parts, SCALE)
    return made, *torch.autograd.grad(made, parts, gradient)


@pytest.fixture(autouse=True, scope="module")
def _many_shapes() -> Iterator[None]:
    """More than a run has, in a process that may have had the strict limit of one."""
    with compilation_settings_kept():
        configure_compilation(memory_budget=1.0, recompile_limit=256)
        yield


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("seq", [1, 7, 127, 128, 129, 300])
def test_it_is_attention_from_whole_matrices_of_logits(seq: int, heads: tuple[int, int]):
    given = inputs(seq, heads)
    for made, wanted in zip(results(blockwise.causal_attention, given), results(plain, given), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("seq", [1, 129, 300])
def test_a_key_without_a_value_takes_its_share(seq: int, heads: tuple[int, int]):
    """By blocks, and by torch's kernels with features that make its logit."""

    def blocks(query: Tensor, key: Tensor, value: Tensor, null: Tensor) -> Tensor:
        return blockwise.causal_attention(query, key, value, SCALE, null)

    def fused(query: Tensor, key: Tensor, value: Tensor, null: Tensor) -> Tensor:
        return attention_kernels.sdpa(query, key, value, None, scale=SCALE, dropout=0.0, null=null)

    def wanted(query: Tensor, key: Tensor, value: Tensor, null: Tensor) -> Tensor:
        return plain_with_null(query, key, value, null, SCALE)

    given = inputs(seq, heads)
    true = with_null(wanted, given)
    for function in (blocks, fused):
        for made, other in zip(with_null(function, given), true, strict=True):
            torch.testing.assert_close(made, other, rtol=1e-11, atol=1e-12)


def test_a_null_logit_keeps_its_precision_in_bf16():
    """Two bf16 parts of it; a single one would be off by 2^-9 of 10."""
    query, key, value, _ = inputs(9, dtype=torch.bfloat16)
    null = torch.full((4,), 10.03)
    found = attention_kernels.sdpa(query, key, value, None, scale=SCALE, dropout=0.0, null=null)
    wanted = plain_with_null(query.double(), key.double(), value.double(), null, SCALE)
    torch.testing.assert_close(found.double(), wanted, rtol=0.012, atol=1e-6)


def test_large_logits_neither_overflow_nor_vanish():
    *parts, gradient = inputs(200)
    given = (parts[0].detach().mul(1e3).requires_grad_(), *parts[1:], gradient)
    for made, wanted in zip(results(blockwise.causal_attention, given), results(plain, given), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "own"),
    [
        ({}, True),
        ({"heads": (4, 2)}, True),
        ({"dtype": torch.float32}, False),
        ({"seq": blockwise.LONGEST + 1}, False),
        ({"bias": True}, False),
        ({"dropout": 0.1}, False),
        ({"queries": 3}, False),
        ({"compiled": False}, False),
    ],
)
def test_it_is_taken_where_it_is_quicker(change: dict[str, Any], own: bool):
    seq = change.get("seq", 16)
    query, key, value, _ = inputs(seq, change.get("heads", (4, 4)), dtype=change.get("dtype", torch.bfloat16))
    query = query[:, :, -change.get("queries", seq) :]
    bias = torch.zeros(seq, seq) if "bias" in change else None
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    def mixed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention_kernels.sdpa(query, key, value, bias, scale=SCALE, dropout=change.get("dropout", 0.0))

    torch.compiler.reset()
    if change.get("compiled", True):
        torch.compile(mixed, backend=backend, fullgraph=True)(query, key, value)
        assert ("scaled_dot_product_attention" not in graphs[0]) is own
    else:
        assert not blockwise.fits(query, key, None, 0.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_in_bf16_its_errors_are_those_of_the_fused_kernel(heads: tuple[int, int]):
    given = inputs(300, heads, dtype=torch.bfloat16)
    wanted = results(plain, [part.detach().double().requires_grad_() for part in given])

    def fused(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    torch.compiler.reset()
    ours, theirs = results(torch.compile(blockwise.causal_attention), given), results(fused, given)
    for made, other, true in zip(ours, theirs, wanted, strict=True):
        assert made.dtype == torch.bfloat16
        assert (made - true).norm() < 1.5 * (other - true).norm()
