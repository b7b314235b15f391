"""Attention within documents: where each begins in a row of tokens, and what hides the others.

A document ends with its end token. `numbers` say which document each token belongs to, from which masks are made;
`boundaries` are what the kernel for unequal lengths takes.
"""

import torch
from torch import Tensor

SHORT_DOCUMENT = 64
"""Tokens; text whose documents are longer on average always gets equally many boundaries."""


def starts(tokens: Tensor, end: int) -> Tensor:
    """tokens: (batch, seq) int64 -> (batch, seq) bool: the first token of each row and those that follow an end."""
    first = torch.ones_like(tokens[:, :1], dtype=torch.bool)
    return torch.cat((first, tokens[:, :-1] == end), dim=1)


def numbers(tokens: Tensor, end: int) -> Tensor:
    """(batch, seq) int32: the document of its row to which each token belongs, from 1."""
    return starts(tokens, end).cumsum(dim=1, dtype=torch.int32)


def places(tokens: Tensor, end: int) -> Tensor:
    """(batch, seq) int64: how many tokens of its document, in this row, come before each."""
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return index - (index * starts(tokens, end)).cummax(dim=1).values


def bias(numbers: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(batch, 1, seq, seq), to be added to logits: 0 for keys of the query's document up to the query, else -inf."""
    hidden = (numbers[:, :, None] == numbers[:, None, :]).tril_().logical_not_()
    return torch.zeros(hidden.shape, dtype=dtype, device=numbers.device).masked_fill_(hidden, -torch.inf)[:, None]


def boundaries(tokens: Tensor, end: int) -> Tensor:
    """int32: where each document of the rows laid end to end begins, then their length, repeated to a fixed count.

    The count depends on the number of tokens alone, but for text of documents shorter than `SHORT_DOCUMENT` on average:
    there it doubles until they fit. On a GPU this waits for the device; it is meant for tokens before they get there.
    """
    at = starts(tokens, end).flatten().nonzero().flatten()
    count = max(len(tokens), tokens.numel() // SHORT_DOCUMENT) + 1
    while count <= len(at):
        count *= 2
    bounds = torch.full((count,), tokens.numel(), dtype=torch.int32, device=tokens.device)
    bounds[: len(at)] = at
    return bounds


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
