"""Causal self-attention with grouped queries."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Widths
from stablelm.methods.norms import RmsNorm
from stablelm.methods.sizes import d_head, d_key_value, logit_scale
from stablelm.model.added_parameters import add_parameters, named_parameters_of
from stablelm.model.attention import attention_kernels, documents
from stablelm.model.attention.cache import LayerCache
from stablelm.model.attention.positions import Positions
from stablelm.model.devices import to_device
from stablelm.model.linear import (
    Dtypes,
    Linear,
    LowRankLinear,
    reparam_of,
)
from stablelm.model.norms import Norm

WATCHED_QUERIES = 256
"""Queries whose logits are looked at together."""


class Attention(nn.Module):
    """The body of an attention sub-layer; query head i reads key/value head i // (n_heads / kv_heads).

    `first_maps` project what the sub-layer reads; `forward` continues from their products.
    """

    def __init__(self, config: ModelConfig, dtypes: Dtypes, width: Widths, layer: int):
        super().__init__()
        assert config.kv_heads is not None
        assert width.attention % config.n_heads == 0
        assert config.n_heads % config.kv_heads == 0
        self.config, self.layer = config, layer
        self.position, self.shaping = config.axes.position, config.axes.shaping
        self.gate, self.softmax, self.gains = config.axes.gate, config.axes.softmax, config.axes.gains.at(config)
        self.d_head, self.kv_heads = d_head(config), config.kv_heads
        self.scale = logit_scale(config)
        self.dropout = config.dropout
        self._kept: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self.largest_logits: Tensor | None = None
        """(n_heads,) of training passes, before cap and bias, where an engine asks for them by setting it."""
        bias, reparam, d_kv = bool(config.bias), reparam_of(config, 2 * layer), d_key_value(config)
        inner = config.axes.maps.rank(config)

        def first(d_out: int) -> Linear | LowRankLinear:
            if inner is None:
                return Linear(width.read, d_out, bias=bias, dtypes=dtypes, reparam=reparam)
            return LowRankLinear(width.read, inner, d_out, bias=bias, dtypes=dtypes, reparam=reparam)

        self.query, self.key = first(width.attention), first(d_kv)
        self.value = first(d_kv) if config.axes.maps.has_values else None
        gates = self.gate.width(config)
        own = {"bias": False, "dtypes": dtypes, "reparam": reparam}
        self.head_gate = Linear(width.read, gates, **own) if gates else None
        self.norm_query = self.norm_key = None
        if config.attention.qk_norm:
            # RMSNorm over each head, gains shared by heads (Wortsman et al. 2024; OLMo et al. 2024).
            self.norm_query = Norm(config, dtypes, self.d_head, kind=RmsNorm())
            self.norm_key = Norm(config, dtypes, self.d_head, kind=RmsNorm())
        self.placement = config.axes.placement
        inner_norm = self.placement.at(config, 2 * layer).before_output
        self.norm_inner = Norm(config, dtypes, width.attention) if inner_norm else None
        self.output = None
        if self.value is not None:
            self.output = Linear(width.attention, width.branch, bias=bias, dtypes=dtypes, reparam=reparam)
        added = [parameter for value in config.axes.each() for parameter in value.in_attention(config, layer)]
        self.added = add_parameters(self, (*added, *self.gains.in_body(config, 2 * layer)), dtypes)

    @property
    def first_maps(self) -> tuple[Linear | LowRankLinear, ...]:
        return tuple(part for part in (self.query, self.key, self.value, self.head_gate) if part is not None)

    @property
    def first_widths(self) -> list[int]:
        """Of queries and keys together, which `Position.turn` takes at once, of values, and of the gate's logits."""
        d_kv, gates = self.kv_heads * self.d_head, self.gate.width(self.config)
        values = [] if self.value is None else [d_kv]
        return [self.config.n_heads * self.d_head + d_kv, *values, *([gates] if gates else [])]

    @property
    def passes_input(self) -> bool:
        """Whether what the sub-layer reads is the second of the products, in the place of values."""
        return self.value is None

    def forward(self, products: tuple[Tensor, ...], positions: Positions, *, cache: LayerCache | None = None) -> Tensor:
        """products: queries and keys (batch, seq, d_attention + d_kv), values (batch, seq, d_kv), with a gate its
        logits -> (batch, seq, branch).

        With a cache, the products are of the new tokens, which see the earlier ones too.
        """
        query, key = self.queries_and_keys(products, positions)
        # A copy: kept as a slice, it would keep the queries and keys beside it, which are kept turned.
        value = products[1].contiguous().unflatten(-1, (-1, self.d_head)).transpose(1, 2)
        if cache is not None:
            key, value = cache.extend(key, value)
        if self.largest_logits is not None and torch.is_grad_enabled():
            self._watch(query, key, self.largest_logits)
        mixed = self._mix(query, key, value, positions, cache).transpose(1, 2)  # (batch, seq, heads, d_head)
        if self.head_gate is not None:
            mixed = self.gate.apply(mixed, products[2], self.added_parameters())
        mixed = self.placement.mixed(mixed, self.added_parameters()).flatten(-2)
        if self.norm_inner is not None:
            mixed = self.norm_inner(mixed)
        return mixed if self.output is None else self.output(mixed)

    def added_parameters(self) -> dict[str, Tensor]:
        """What axis values add to this body, by name."""
        return named_parameters_of(self, self.added)

    def queries_and_keys(self, products: tuple[Tensor, ...], positions: Positions) -> tuple[Tensor, Tensor]:
        """(batch, heads, seq, d_head) each, with norms and positions."""
        both, heads = products[0].unflatten(-1, (-1, self.d_head)), [self.config.n_heads, self.kv_heads]
        tables = positions.tables
        if self.norm_query is None or self.norm_key is None:  # both: (batch, seq, heads, d_head)
            query, key = self.position.turn(both, tables).split(heads, dim=2)
        else:
            query, key = both.split(heads, dim=2)
            query, key = self.norm_query(query).to(query.dtype), self.norm_key(key).to(key.dtype)
            query, key = self.position.turn(query, tables), self.position.turn(key, tables)
        if self.gains.after_turn:
            query, key = self.gains.queries_and_keys(query, key, self.added_parameters())
        return query.transpose(1, 2), key.transpose(1, 2)

    def logits(self, query: Tensor, key: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """(batch, heads, queries, keys) in at least fp32, capped and biased, -inf for keys after the query.

        The queries are of the last tokens; without a cache, of all.
        """
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        dtype = torch.promote_types(query.dtype, torch.float32)
        logits = (query @ key.transpose(-1, -2)).to(dtype) * self.scale
        cap = self.config.attention.logit_cap
        if cap:
            logits = cap * torch.tanh(logits / cap)
        bias = self._bias(positions, query, cache)
        if bias is not None:
            return logits + bias.to(dtype)
        earlier = key.shape[-2] - query.shape[-2]
        after = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1 + earlier)
        return logits.masked_fill(after, -torch.inf)

    def weights(self, logits: Tensor, heads: slice = slice(None)) -> Tensor:
        """The weights of these logits, of `logits` for some of the heads."""
        null = self._null(logits)
        return self.softmax.weights(self.config, logits, None if null is None else null[heads])

    def _null(self, like: Tensor) -> Tensor | None:
        """(heads,): the logits of what takes weight beside the keys; None: nothing does."""
        return self.softmax.null_logits(self.config.n_heads, self.added_parameters(), like)

    @torch.compiler.disable()
    @torch.no_grad()
    def _watch(self, query: Tensor, key: Tensor, largest: Tensor) -> None:
        """Raises `largest` (n_heads,) to the logits of these rows, a few queries at a time."""
        key = key.detach().repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-1, -2)
        for start in range(0, query.shape[-2], WATCHED_QUERIES):
            own = query[..., start : start + WATCHED_QUERIES, :].detach()
            stop = start + own.shape[-2]
            logits = own @ key[..., :stop]
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1 + start)
            found = logits.masked_fill_(later, -torch.inf).amax(dim=(0, 2, 3)) * self.scale
            torch.maximum(largest, found.to(largest.dtype), out=largest)

    def _bias(self, positions: Positions, query: Tensor, cache: LayerCache | None) -> Tensor | None:
        """What is added to the logits, with the causal mask in it; None: nothing but the mask."""
        if self.shaping.active:
            return self._shaped(query, cache)[0]
        return positions.dense_bias(query.shape[-2], torch.promote_types(query.dtype, torch.float32))

    @torch.compiler.disable()
    def _shaped(self, query: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """The shaping's bias and row scale for these queries, without a cache kept for the next call."""
        if cache is not None:
            return cache.shaped(self.shaping, self.layer, torch.promote_types(query.dtype, torch.float32))
        key = (query.shape[-2], query.device, torch.promote_types(query.dtype, torch.float32))
        if self._kept is None or self._kept[0] != key:
            both = self.shaping.bias_and_scale(self.config, self.layer, key[0])
            bias, rows = (to_device(torch.from_numpy(each).to(key[2]), query.device) for each in both)
            self._kept = key, (bias[None, None], rows[:, None])
        return self._kept[1]

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, cache: LayerCache | None) -> Tensor:
        """(batch, heads, queries, d_head): values averaged by softmax attention, shaped."""
        mixed = self._average(query, key, value, positions, cache, self.dropout if self.training else 0.0)
        if self.shaping.combines:
            own = value if cache is None else cache.of_new(value)
            own = _shared_by_heads(own, query.shape[1])
            centre = self._centre(query, key, value, positions, cache) if self.shaping.centres else mixed
            return self.shaping.combine(own, mixed, centre, self.added_parameters())
        return mixed * self._shaped(query, cache)[1].to(mixed.dtype) if self.shaping.active else mixed

    def _centre(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Positions, cache: LayerCache | None
    ) -> Tensor:
        """What attention would average if all queries were zero: the mean of all values so far, where nothing else
        tells keys apart."""
        if cache is not None or not positions.is_causal or not self.softmax.is_plain(self.config):
            return self._average(torch.zeros_like(query), key, value, positions, cache, 0.0)
        wide = torch.promote_types(value.dtype, torch.float32)
        counts = torch.arange(1, value.shape[2] + 1, dtype=wide, device=value.device)
        means = (value.cumsum(dim=2, dtype=wide) / counts[:, None]).to(value.dtype)
        return _shared_by_heads(means, query.shape[1])

    def _average(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Positions,
        cache: LayerCache | None,
        dropout: float,
    ) -> Tensor:
        cap, null = self.config.attention.logit_cap, self._null(query)
        if positions.boundaries is not None:
            return documents.average(query, key, value, positions.boundaries, self.scale)
        if positions.blocks is not None:
            bias = self._shaped(query, cache)[0] if self.shaping.active else positions.bias
            changes = {"cap": cap, "slopes": positions.slopes, "bias": bias, "null": null}
            return attention_kernels.flex(query, key, value, positions.blocks, scale=self.scale, **changes)
        if cap or self.softmax.clip(self.config) is not None:
            weights = F.dropout(self.weights(self.logits(query, key, positions, cache)).to(value.dtype), dropout)
            return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        bias = self._bias(positions, query, cache)
        return attention_kernels.sdpa(query, key, value, bias, scale=self.scale, dropout=dropout, null=null)


def _shared_by_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, seq, d_head) -> (batch, heads, seq, d_head), without a copy where these are as many."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
