"""Causal attention on a CPU by blocks of queries, from operations that torch.compile fuses.

torch's own kernel for CPUs spends most of its time outside its products, more so backwards. A block of queries sees the
keys up to its last one; what the backward pass needs of the weights is their log-sum-exp (Dao et al. 2022, algorithm 4
of the appendix), so that no more is kept than by the fused kernels. Logits are made and exponentiated in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128
LONGEST = 1024  # the blocks are unrolled: a longer graph takes longer to compile, and gains less


def fits(query: Tensor, key: Tensor, bias: Tensor | None, dropout: float) -> bool:
    """Whether `causal_attention` computes this, and quicker than torch's kernel: in bf16, where its parts are fused."""
    return (
        torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.shape[2] == key.shape[2] <= LONGEST
        and bias is None
        and dropout == 0
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query: (batch, heads, seq, d_head); key, value: (batch, kv_heads, seq, d_head) -> as query."""
    batch, heads, seq, width = query.shape
    flat = (part.reshape(batch * key.shape[1], -1, seq, width) for part in (query, key, value))
    return _Causal.apply(*flat, scale).view(batch, heads, seq, width)  # pyright: ignore[reportOptionalMemberAccess]


def _blocks(seq: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, seq)) for start in range(0, seq, BLOCK)]


def _rows(x: Tensor, block: slice) -> Tensor:
    """(groups, heads, seq, d) -> (groups, heads x block, d): a block of all heads that share keys and values."""
    return x[:, :, block].flatten(1, 2)


def _logits(query: Tensor, key: Tensor, block: slice, scale: float) -> Tensor:
    """(groups, heads, block, keys up to the block's end) in at least fp32, -inf after the query."""
    products = _rows(query, block) @ key[:, : block.stop].transpose(1, 2)
    logits = products.unflatten(1, (query.shape[1], -1)) * scale
    keys = torch.arange(block.stop, device=query.device)
    return torch.where(keys <= keys[block, None], logits, -torch.inf)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Causal(torch.autograd.Function):
    """query: (groups, heads that share keys, seq, d_head); key, value: (groups, 1, seq, d_head)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        wide_query, wide_key = _wide(query), _wide(key[:, 0])
        means, sums = [], []
        for block in _blocks(query.shape[2]):
            logits = _logits(wide_query, wide_key, block, scale)
            largest = logits.amax(dim=-1, keepdim=True)
            weights = torch.exp(logits - largest)
            total = weights.sum(dim=-1, keepdim=True)
            mean = weights.to(value.dtype).flatten(1, 2) @ value[:, 0, : block.stop]
            means.append((mean.unflatten(1, (query.shape[1], -1)) / total).to(value.dtype))
            sums.append(largest + total.log())
        mixed, log_sums = torch.cat(means, dim=2), torch.cat(sums, dim=2)
        ctx.save_for_backward(query, key, value, mixed, log_sums)
        ctx.scale = scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """With weights P = e^(S - log-sum-exp): dV = P^T dO; dS = P (dO V^T - sum(dO O)); dQ = dS K; dK = dS^T Q."""
        query, key, value, mixed, log_sums = ctx.saved_tensors
        wide_query, wide_key, heads = _wide(query), _wide(key[:, 0]), query.shape[1]
        common = (_wide(gradient) * _wide(mixed)).sum(dim=-1, keepdim=True)
        of_query, of_key, of_value = [], [], []
        for block in _blocks(query.shape[2]):
            keys, values, rows = key[:, 0, : block.stop], value[:, 0, : block.stop], _rows(gradient, block)
            weights = torch.exp(_logits(wide_query, wide_key, block, ctx.scale) - log_sums[:, :, block])
            slopes = (rows @ values.transpose(1, 2)).unflatten(1, (heads, -1))
            slopes = (weights * (slopes - common[:, :, block]) * ctx.scale).to(query.dtype).flatten(1, 2)
            of_query.append((slopes @ keys).unflatten(1, (heads, -1)))
            of_key.append(slopes.transpose(1, 2) @ _rows(query, block))
            of_value.append(weights.to(value.dtype).flatten(1, 2).transpose(1, 2) @ rows)
        return torch.cat(of_query, dim=2), _added(of_key), _added(of_value), None


def _added(parts: list[Tensor]) -> Tensor:
    """Each part (groups, keys up to its block's end, d) -> (groups, 1, seq, d): added up block by block."""
    blocks = _blocks(parts[-1].shape[1])
    sums = [sum(_wide(part[:, block]) for part in parts[i:]) for i, block in enumerate(blocks)]
    return torch.cat(sums, dim=1).to(parts[0].dtype)[:, None]  # pyright: ignore[reportArgumentType, reportCallIssue]
