"""Causal self-attention with grouped queries."""

import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.model.linear import Dtypes, Linear
from stablelm.model.positions import Rotation, rotate


class Attention(nn.Module):
    """The body of an attention sub-layer; query head i reads key/value head i // (n_heads / kv_heads)."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes):
        super().__init__()
        assert config.kv_heads is not None
        assert config.d_model % config.n_heads == 0
        assert config.n_heads % config.kv_heads == 0
        self.d_head = config.d_model // config.n_heads
        self.grouped = config.kv_heads != config.n_heads
        self.dropout = config.dropout
        bias = bool(config.bias)
        d_kv = config.kv_heads * self.d_head
        self.query = Linear(config.d_model, config.d_model, bias=bias, dtypes=dtypes)
        self.key = Linear(config.d_model, d_kv, bias=bias, dtypes=dtypes)
        self.value = Linear(config.d_model, d_kv, bias=bias, dtypes=dtypes)
        self.output = Linear(config.d_model, config.d_model, bias=bias, dtypes=dtypes)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        """x: (batch, seq, d_model) -> the same shape; `rotation` is (cos, sin) for rope, else empty."""
        query = self.query(x).unflatten(-1, (-1, self.d_head))  # (batch, seq, heads, d_head)
        key = self.key(x).unflatten(-1, (-1, self.d_head))
        value = self.value(x).unflatten(-1, (-1, self.d_head))
        if rotation:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.grouped,
        )
        return self.output(mixed.transpose(1, 2).flatten(-2))
