"""Causal attention for training in bf16 on a CPU, by blocks of queries, compiled.

torch's own kernel for CPUs spends most of its time outside its products, more so backwards. A block of queries sees the
keys up to its last one; what the backward pass needs of the weights is their log-sum-exp (Dao et al. 2022, algorithm 4
of the appendix), so that no more is kept than by torch's kernel. Logits are made and exponentiated in fp32.

Each pass is an operator of its own, which compiles itself: traced into a layer's graph, its logits would be kept.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
LONGEST = 1024  # a longer graph takes longer to compile, and gains less


def fits(query: Tensor, key: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Whether `causal_attention` computes this, and quicker than torch's kernel: where layers are compiled, too."""
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] <= LONGEST
        and bias is None
        and dropout == 0
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, null: Tensor | None = None) -> Tensor:
    """query: (batch, heads, seq, d_head); key, value: (batch, kv_heads, seq, d_head) -> as query.

    null: (heads,), the logit of a further term in the denominator of each head's softmax.
    """
    return _attend(query, key, value, null, scale)[0].transpose(1, 2)


@torch.library.custom_op("stablelm::causal_attention", mutates_args=(), device_types="cpu")
def _attend(query: Tensor, key: Tensor, value: Tensor, null: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """-> (batch, seq, heads, d_head), as the next product reads it, so that it is kept once; and the log-sum-exp of
    each row of logits, (groups, heads, seq, 1) in at least fp32: `_grouped`."""
    return _compiled(forward)(query, key, value, null, scale)


@torch.library.custom_op("stablelm::causal_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null: Tensor | None,
    mixed: Tensor,
    log_sums: Tensor,
    gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous, and of null (empty if there is none), from that of `mixed`."""
    return _compiled(backward)(query, key, value, null, mixed, log_sums, gradient, scale)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, null: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, seq, width = query.shape
    groups = batch * key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    sums = query.new_empty((groups, batch * heads // groups, seq, 1), dtype=wide)
    return query.new_empty((batch, seq, heads, width)), sums


@_attend_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, null: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_null = query.new_empty(0) if null is None else torch.empty_like(null)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), of_null


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.scale = inputs[4]


def _differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *found, of_null = _attend_backward(*ctx.saved_tensors, gradient, ctx.scale)
    return *found, None if ctx.saved_tensors[3] is None else of_null, None


_attend.register_autograd(_differentiate, setup_context=_keep)


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function)


def forward(query: Tensor, key: Tensor, value: Tensor, null: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """What `_attend` returns."""
    batch, heads, (query, key, value) = len(query), query.shape[1], _grouped(query, key, value)
    nulls = None if null is None else _of_groups(null, query)
    wide_query, wide_key, shared = _wide(query), _wide(key[:, 0]), query.shape[1]
    means, sums = [], []
    for block in _blocks(query.shape[2]):
        products = _rows(wide_query, block) @ wide_key[:, : block.stop].transpose(1, 2)
        logits = torch.where(_seen(block), products.unflatten(1, (shared, -1)) * scale, -torch.inf)
        largest = logits.amax(dim=-1, keepdim=True)
        largest = largest if nulls is None else torch.maximum(largest, nulls)
        weights = torch.exp(logits - largest)
        total = weights.sum(dim=-1, keepdim=True)
        total = total if nulls is None else total + torch.exp(nulls - largest)
        mean = weights.to(value.dtype).flatten(1, 2) @ value[:, 0, : block.stop]
        means.append((mean.unflatten(1, (shared, -1)) / total).to(value.dtype))
        sums.append(largest + total.log())
    mixed = torch.cat(means, dim=2).view(batch, heads, *query.shape[2:])
    return mixed.transpose(1, 2).contiguous(), torch.cat(sums, dim=2)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    null: Tensor | None,
    mixed: Tensor,
    log_sums: Tensor,
    gradient: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_attend_backward` returns; with weights P = e^(S - log-sum-exp):

    dV = P^T dO; dS = P (dO V^T - sum(dO O)); dQ = dS K; dK = dS^T Q; and for the null logit, whose value is 0,
    -P_null sum(dO O).
    """
    shapes = [part.shape for part in (query, key, value)]
    query, key, value = _grouped(query, key, value)
    gradient, mixed = (part.transpose(1, 2).reshape(query.shape) for part in (gradient, mixed))
    wide_query, wide_key, shared = _wide(query), _wide(key[:, 0]), query.shape[1]
    common = (_wide(gradient) * _wide(mixed)).sum(dim=-1, keepdim=True)
    of_null = query.new_zeros(0)
    if null is not None:
        shares = torch.exp(_of_groups(null, query) - log_sums)
        of_null = -(shares * common).sum(dim=(2, 3)).view(-1, len(null)).sum(dim=0).to(null.dtype)
    of_query, of_key, of_value = [], [], []
    for block in _blocks(query.shape[2]):
        keys, values, rows = key[:, 0, : block.stop], value[:, 0, : block.stop], _rows(gradient, block)
        products = _rows(wide_query, block) @ wide_key[:, : block.stop].transpose(1, 2)
        weights = torch.exp(products.unflatten(1, (shared, -1)) * scale - log_sums[:, :, block])
        weights = torch.where(_seen(block), weights, 0.0)
        slopes = (rows @ values.transpose(1, 2)).unflatten(1, (shared, -1)) - common[:, :, block]
        slopes = (weights * slopes * scale).to(query.dtype).flatten(1, 2)
        of_query.append((slopes @ keys).unflatten(1, (shared, -1)))
        of_key.append(slopes.transpose(1, 2) @ _rows(query, block))
        of_value.append(weights.to(value.dtype).flatten(1, 2).transpose(1, 2) @ rows)
    made = torch.cat(of_query, dim=2), _added(of_key), _added(of_value)
    first, second, third = (part.view(shape) for part, shape in zip(made, shapes, strict=True))
    return first, second, third, of_null


def _of_groups(null: Tensor, grouped: Tensor) -> Tensor:
    """(heads,) -> (groups, heads that share keys, 1, 1), for queries in that form."""
    return null.repeat(grouped.shape[0] * grouped.shape[1] // len(null)).view(*grouped.shape[:2], 1, 1)


def _grouped(query: Tensor, *keys_and_values: Tensor) -> list[Tensor]:
    """As (groups, heads that share keys, seq, d_head) and (groups, 1, seq, d_head); groups: batch x kv_heads."""
    groups = query.shape[0] * keys_and_values[0].shape[1]
    return [part.reshape(groups, -1, *part.shape[2:]) for part in (query, *keys_and_values)]


def _blocks(seq: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, seq)) for start in range(0, seq, BLOCK)]


def _rows(x: Tensor, block: slice) -> Tensor:
    """(groups, heads, seq, d) -> (groups, heads x block, d): a block of all heads that share keys and values."""
    return x[:, :, block].flatten(1, 2)


def _seen(block: slice) -> Tensor:
    """(block, keys up to its end): whether the key is not after the query."""
    keys = torch.arange(block.stop)
    return keys <= keys[block, None]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _added(parts: list[Tensor]) -> Tensor:
    """Each part (groups, keys up to its block's end, d) -> (groups, 1, seq, d): added up block by block."""
    blocks = _blocks(parts[-1].shape[1])
    sums = [sum(_wide(part[:, block]) for part in parts[i:]) for i, block in enumerate(blocks)]
    return torch.cat(sums, dim=1).to(parts[0].dtype)[:, None]  # pyright: ignore[reportArgumentType, reportCallIssue]
