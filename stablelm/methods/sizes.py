"""Widths of heads, parameters and floating-point operations of a model, in closed form."""

import math
from collections.abc import Sequence

from stablelm.methods.axes import Model, Widths

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
        rows = (model.d_ff,) * (1 + model.axes.activation.gated)
        return [*_entering(model, sublayer, width.read, rows), (model.d_ff, (width.branch,))]
    d_kv, maps, gate = d_key_value(model), model.axes.maps, model.axes.gate.width(model)
    first, inner = (width.attention, d_kv, d_kv)[: 2 + maps.has_values], maps.rank(model)
    rows = (first if inner is None else (inner,) * len(first)) + (gate,) * bool(gate)
    factors = [] if inner is None else [(inner, (each,)) for each in first]
    output = [(width.attention, (width.branch,))] * maps.has_values
    return [*_entering(model, sublayer, width.read, rows), *factors, *output]


def _entering(model: Model, sublayer: int, d_in: int, rows: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """The first products: one of all rows, or one for each input."""
    if model.axes.stream.separate_inputs(model, sublayer):
        return [(d_in, (each,)) for each in rows]
    return [(d_in, rows)]


def logit_scale(model: Model) -> float:
    """What multiplies query . key."""
    axes = model.axes
    return axes.init.logit_scale(d_head(model)) * axes.shaping.logit_factor(model) * axes.gains.logit_factor(model)


def fits_float8(d_in: int, rows: Sequence[int], least: int) -> bool:
    """Whether kernels of 8-bit numbers take the matrices, and their product's sides are at least `least`."""
    return not any(side % FLOAT8_MULTIPLE for side in (d_in, *rows)) and min(d_in, sum(rows)) >= least


def stream_width(model: Model, layer: int) -> int:
    """Features that a sub-layer reads after that many layers."""
    return widths(model, 2 * layer).read


def parameter_counts(model: Model) -> dict[str, int]:
    """Numbers of parameters.

    `total`: distinct parameters; `embedding`: token table and learned positions; `head`: 0 when tied;
    `layers`: all in the layers; `matmul`: those a token is multiplied with (matrices of the layers, at each place
    that they take and with those that the stream adds, the projection of a stream that grows and the head, tied or
    not).
    """
    assert model.vocab_size is not None
    assert model.max_seq_len is not None
    stream, stack = model.axes.stream, model.axes.stack
    layers = [stack.first_place(model, layer) for layer in range(stack.distinct(model))]
    if stream.layers_differ or model.axes.placement.layers_differ:
        matrices, others = (sum(both) for both in zip(*(_layer(model, i) for i in layers), strict=True))
    else:
        matrices, others = (len(layers) * one for one in _layer(model, 0))
    for layer in layers:
        added = (
            *stream.in_layer(model, layer),
            *(each for half in (0, 1) for each in stream.in_sublayer(model, 2 * layer + half)),
            *(each for value in model.axes.each() for each in value.in_attention(model, layer)),
            *(each for half in (0, 1) for each in model.axes.gains.in_body(model, 2 * layer + half)),
        )
        matrices += sum(each.start.size for each in added if each.map)
        others += sum(each.start.size for each in added if not each.map)
    end = stream_width(model, model.n_layers)
    projection = end * model.d_model if stream.grows else 0
    norms = model.axes.placement.final * _norm(model, end) + bool(model.embedding_norm) * _norm(model, model.d_model)
    norms += model.axes.norm.embedding_gain(model) is not None
    vocabulary = model.vocab_size * model.d_model
    embedding = vocabulary + (model.max_seq_len * model.d_model if model.axes.position.adds_table else 0)
    head = 0 if model.tie_embeddings else vocabulary
    factors = 0 if model.tie_embeddings else sum(each.start.size for each in model.axes.gains.in_head(model))
    # Each place multiplies by its layer's matrices.
    multiplied = matrices if not stack.shared else matrices // len(layers) * model.n_layers
    return {
        "total": embedding + matrices + others + norms + projection + head + factors,
        "embedding": embedding,
        "head": head,
        "layers": matrices + others,
        "matmul": multiplied + projection + vocabulary,
    }


def flops_per_token(model: Model, seq_len: int) -> float:
    """Operations a trained token, forward and backward, recompute not counted.

    6 x matmul parameters plus causal attention: two products of seq_len / 2 keys on average, 2 operations
    each, three times for the two passes: 6 n_layers seq_len d_attention (Chowdhery et al. 2022, appendix B, halved);
    plus what the stream multiplies beside.
    """
    attention = 6.0 * model.n_layers * seq_len * widths(model, 0).attention
    return 6.0 * (parameter_counts(model)["matmul"] + stream_multiplications(model)) + attention


def stream_multiplications(model: Model) -> int:
    """Of a token in matrix products of the stream, beside one with each parameter of the count `matmul`."""
    return sum(model.axes.stream.multiplications(model, index) for index in range(2 * model.n_layers))


def _layer(model: Model, layer: int) -> tuple[int, int]:
    """Elements of a layer's matrices, and of all else in it but what the stream adds."""
    pairs = [
        part(model, widths(model, index), index)
        for index, part in ((2 * layer, _attention), (2 * layer + 1, _feedforward))
    ]
    return sum(matrix for matrix, _ in pairs), sum(other for _, other in pairs)


def _attention(model: Model, width: Widths, index: int) -> tuple[int, int]:
    d_kv = d_key_value(model)
    others = 2 * d_head(model) if model.attention.qk_norm else 0
    values = model.axes.maps.has_values
    others += width.attention + d_kv + values * (d_kv + width.branch) if model.bias else 0
    return _body(model, width, index, others, width.attention)


def _feedforward(model: Model, width: Widths, index: int) -> tuple[int, int]:
    assert model.d_ff is not None
    others = (1 + model.axes.activation.gated) * model.d_ff + width.branch if model.bias else 0
    return _body(model, width, index, others, model.d_ff)


def _body(model: Model, width: Widths, index: int, others: int, inner: int) -> tuple[int, int]:
    """With the norms of the placement, and what the reparametrisation adds to each map."""
    maps = [(d_in, d_out) for d_in, rows in products(model, index) for d_out in rows]
    placement, reparam = model.axes.placement.at(model, index), model.axes.reparam
    if reparam.applies(model, index):
        shapes = [shape for d_in, d_out in maps for shape in reparam.parameters(d_in, d_out).values()]
        others += sum(map(math.prod, shapes))
    inputs = 3 if index % 2 == 0 else 1 + model.axes.activation.gated
    inputs = inputs if model.axes.stream.separate_inputs(model, index) else 1
    others += placement.before_body * inputs * _norm(model, width.read) + placement.before_output * _norm(model, inner)
    others += (placement.on_branch + placement.after_write) * _norm(model, width.branch)
    return sum(d_in * d_out for d_in, d_out in maps), others


def _norm(model: Model, width: int) -> int:
    norm = model.axes.norm
    return width * (norm.has_gain + (bool(model.bias) and norm.has_bias)) + norm.has_slope
