"""Attention within documents: where each begins in a row of tokens, and what hides the others.

A document ends with its end token. One kernel for unequal lengths serves GPUs, where it exists; elsewhere a mask does,
with the same numbers.
"""

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig


def starts(tokens: Tensor, end: int) -> Tensor:
    """tokens: (batch, seq) int64 -> (batch, seq) bool: the first token of each row and those that follow an end."""
    first = torch.ones_like(tokens[:, :1], dtype=torch.bool)
    return torch.cat((first, tokens[:, :-1] == end), dim=1)


def places(tokens: Tensor, end: int) -> Tensor:
    """(batch, seq) int64: how many tokens of its document, in this row, come before each."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return index - (index * starts(tokens, end)).cummax(dim=1).values


def bias(tokens: Tensor, end: int, *, dtype: torch.dtype) -> Tensor:
    """(batch, 1, seq, seq), to be added to logits: 0 for keys of the query's document up to the query, else -inf."""
    number = starts(tokens, end).cumsum(dim=1)
    seen = (number[:, :, None] == number[:, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, -torch.inf)[:, None]


def boundaries(tokens: Tensor, end: int) -> Tensor:
    """(documents + 1,) int32: where each document of the rows laid end to end begins, then their length."""
    at = starts(tokens, end).flatten().nonzero().flatten()
    return torch.cat((at, at.new_tensor([tokens.numel()]))).to(torch.int32)


def has_kernel(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `average` can do what this model's attention asks for: a GPU with flash attention, half precision,
    and nothing on the logits or the weights."""
    plain = not config.axes.position.biases_logits and not config.attention.logit_cap and config.dropout == 0
    if device.type != "cuda" or dtype != torch.bfloat16 or not plain:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and torch.backends.cuda.is_flash_attention_available()


def average(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Causal attention within documents on a GPU: (batch, heads, seq, d_head) each, `boundaries` of the same rows."""
    from torch.nn.attention.varlen import varlen_attn

    batch, _, seq_len, _ = query.shape
    query, key, value = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))  # (tokens, heads, d_head)
    grouped = query.shape[1] != key.shape[1]
    mixed = varlen_attn(
        query, key, value, bounds, bounds, seq_len, seq_len, scale=scale, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (batch, seq_len)).transpose(1, 2)
