"""Widths of heads, parameters and floating-point operations of a model, in closed form."""

import math
from collections.abc import Sequence

from stablelm.methods.axes import Added, Model, Widths

FLOAT8_MULTIPLE = 16
"""What divides the sides of matrices of 8-bit floating-point numbers that GPUs multiply."""


def widths(model: Model, sublayer: int) -> Widths:
    """The widths of a sub-layer, counted from 0 over both kinds; 2 n_layers is the end of the stream."""
    return model.axes.stream.widths(model, sublayer)


def d_head(model: Model) -> int:
    """Features of one head."""
    return widths(model, 0).attention // model.n_heads


def d_key_value(model: Model) -> int:
    """Features of all key (or value) heads together."""
    return (model.kv_heads or model.n_heads) * d_head(model)


def products(model: Model, sublayer: int) -> list[tuple[int, tuple[int, ...]]]:
    """The products of a sub-layer, each with (d_in, the rows of the matrices that lie side by side in it)."""
    width = widths(model, sublayer)
    if sublayer % 2:
        assert model.d_ff is not None
        return [(width.read, (model.d_ff,) * (1 + model.axes.activation.gated)), (model.d_ff, (width.branch,))]
    d_kv, inner = d_key_value(model), model.axes.maps.rank(model)
    first, output = (width.attention, d_kv, d_kv), (width.attention, (width.branch,))
    if inner is None:
        return [(width.read, first), output]
    return [(width.read, (inner,) * 3), *((inner, (rows,)) for rows in first), output]


def fits_float8(d_in: int, rows: Sequence[int], least: int) -> bool:
    """Whether kernels of 8-bit numbers take the matrices, and their product's sides are at least `least`."""
    return not any(side % FLOAT8_MULTIPLE for side in (d_in, *rows)) and min(d_in, sum(rows)) >= least


def stream_width(model: Model, layer: int) -> int:
    """Features that a sub-layer reads after that many layers."""
    return widths(model, 2 * layer).read


def parameter_counts(model: Model) -> dict[str, int]:
    """Numbers of parameters.

    `total`: distinct parameters; `embedding`: token table and learned positions; `head`: 0 when tied;
    `layers`: all in the layers; `matmul`: those a token is multiplied with (matrices of the layers, the
    projection of a stream that grows and the head, tied or not).
    """
    assert model.vocab_size is not None
    assert model.max_seq_len is not None
    stream = model.axes.stream
    if stream.grows:
        matrices, others = (sum(both) for both in zip(*(_layer(model, i) for i in range(model.n_layers)), strict=True))
    else:
        matrices, others = (model.n_layers * one for one in _layer(model, 0))
    for layer in range(model.n_layers):
        others += _added(stream.in_layer(model, layer)) + _added(model.axes.value_mixing.in_layer(model, layer))
        others += sum(_added(stream.in_sublayer(model, index)) for index in (2 * layer, 2 * layer + 1))
    end = stream_width(model, model.n_layers)
    projection = end * model.d_model if stream.grows else 0
    norms = model.axes.placement.final * _norm(model, end) + bool(model.embedding_norm) * _norm(model, model.d_model)
    norms += model.axes.norm.embedding_gain(model) is not None
    vocabulary = model.vocab_size * model.d_model
    embedding = vocabulary + (model.max_seq_len * model.d_model if model.axes.position.adds_table else 0)
    head = 0 if model.tie_embeddings else vocabulary
    return {
        "total": embedding + matrices + others + norms + projection + head,
        "embedding": embedding,
        "head": head,
        "layers": matrices + others,
        "matmul": matrices + projection + vocabulary,
    }


def flops_per_token(model: Model, seq_len: int) -> float:
    """Operations a trained token, forward and backward, recompute not counted.

    6 x matmul parameters plus causal attention: two products of seq_len / 2 keys on average, 2 operations
    each, three times for the two passes: 6 n_layers seq_len d_attention (Chowdhery et al. 2022, appendix B, halved).
    """
    attention = 6.0 * model.n_layers * seq_len * widths(model, 0).attention
    return 6.0 * parameter_counts(model)["matmul"] + attention


def _layer(model: Model, layer: int) -> tuple[int, int]:
    """Elements of a layer's matrices, and of all else in it but what the stream adds."""
    pairs = [
        part(model, widths(model, index), index)
        for index, part in ((2 * layer, _attention), (2 * layer + 1, _feedforward))
    ]
    return sum(matrix for matrix, _ in pairs), sum(other for _, other in pairs)


def _added(parameters: tuple[Added, ...]) -> int:
    return sum(parameter.start.size for parameter in parameters)


def _attention(model: Model, width: Widths, index: int) -> tuple[int, int]:
    d_kv = d_key_value(model)
    others = 2 * d_head(model) if model.attention.qk_norm else 0
    others += width.attention + 2 * d_kv + width.branch if model.bias else 0
    return _body(model, width, index, others, width.attention)


def _feedforward(model: Model, width: Widths, index: int) -> tuple[int, int]:
    assert model.d_ff is not None
    others = (1 + model.axes.activation.gated) * model.d_ff + width.branch if model.bias else 0
    return _body(model, width, index, others, model.d_ff)


def _body(model: Model, width: Widths, index: int, others: int, inner: int) -> tuple[int, int]:
    """With the norms of the placement, and what the reparametrisation adds to each map."""
    maps = [(d_in, d_out) for d_in, rows in products(model, index) for d_out in rows]
    placement, reparam = model.axes.placement, model.axes.reparam
    if reparam.applies(model, index):
        shapes = [shape for d_in, d_out in maps for shape in reparam.parameters(d_in, d_out).values()]
        others += sum(map(math.prod, shapes))
    others += placement.before_body * _norm(model, width.read) + placement.before_output * _norm(model, inner)
    others += (placement.on_branch + placement.after_write) * _norm(model, width.branch)
    return sum(d_in * d_out for d_in, d_out in maps), others


def _norm(model: Model, width: int) -> int:
    norm = model.axes.norm
    return width * (1 + (bool(model.bias) and norm.has_bias)) + norm.has_slope
