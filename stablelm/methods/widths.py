"""Widths of every sub-layer: constant on a sum, growing on a concatenated stream (torch-free)."""

from dataclasses import dataclass

from stablelm.config.schema import ModelConfig


@dataclass(frozen=True)
class Widths:
    """Features that a sub-layer reads, that its heads have together, and that its branch has."""

    read: int
    attention: int
    branch: int


def widths(config: ModelConfig, sublayer: int) -> Widths:
    """The widths of a sub-layer, counted from 0 over both kinds; `sublayer` 2 n_layers is the end of the stream."""
    if config.stream != "concat":
        return Widths(config.d_model, config.d_model, config.d_model)
    growth, d_attention = config.catformer.growth, config.catformer.d_attention
    assert growth is not None
    assert d_attention is not None
    return Widths(config.d_model + sublayer * growth, d_attention, growth)


def stream_width(config: ModelConfig, layer: int) -> int:
    """Features of the stream after that many layers."""
    return widths(config, 2 * layer).read


def d_head(config: ModelConfig) -> int:
    """Features of one head."""
    return widths(config, 0).attention // config.n_heads


def d_key_value(config: ModelConfig) -> int:
    """Features of all key (or value) heads together."""
    return (config.kv_heads or config.n_heads) * d_head(config)


def rank(config: ModelConfig) -> int | None:
    """Inner width of factorised query, key and value maps; None: they are whole."""
    share = config.attention.low_rank
    return max(1, round(share * config.d_model)) if share else None
