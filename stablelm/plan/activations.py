"""Bytes that the backward pass needs of a micro-batch, in closed form for every point of the method space (torch-free).

What autograd keeps is counted operation by operation from the code of `model.sublayer` and its bodies (derived here;
for a plain pre-norm layer it comes to the terms of Korthikanti et al., Reducing Activation Recomputation in Large
Transformer Models, 2023, section 4.1, with fused attention in place of the quadratic terms). Eager execution is meant:
torch.compile may keep less.
"""

from dataclasses import dataclass

from stablelm.config.schema import Config, ModelConfig
from stablelm.methods.axes import Widths
from stablelm.methods.catformer import MERGED
from stablelm.methods.sizes import d_key_value, stream_width, widths

TOKEN_BYTES = 8  # an int64 index


@dataclass(frozen=True)
class Sizes:
    """Bytes an element by purpose, and the shape of a micro-batch."""

    parameter: int
    compute: int
    stream: int
    sequences: int
    seq_len: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_len


def sizes_of(config: Config) -> Sizes:
    """Sizes of a resolved config, as `model.linear.make_dtypes` gives them."""
    precision, seq_len = str(config.train.precision), config.data.seq_len
    micro = config.train.micro_batch_size
    assert micro is not None
    if precision == "bf16":
        return Sizes(4, 2, 2 if config.model.stream_dtype == "bf16" else 4, micro, seq_len)
    width = {"fp32": 4, "fp64": 8}[precision]
    return Sizes(width, width, width, micro, seq_len)


def kept(config: Config) -> int:
    """Bytes kept from the forward pass of one micro-batch, weights and their copies left out."""
    model, sizes = config.model, sizes_of(config)
    if config.engine.recompute == "full":
        layers = sum(layer_inputs(model, sizes, layer) for layer in range(model.n_layers))
    else:
        layers = sum(layer(model, sizes, index) for index in range(model.n_layers))
    return layers + merged(model, sizes) + ends(model, sizes)


def recomputed(config: Config) -> int:
    """Bytes that one layer, the most expensive, keeps again while its backward pass runs; 0 without recompute."""
    if config.engine.recompute != "full":
        return 0
    return layer(config.model, sizes_of(config), config.model.n_layers - 1)


def layer_inputs(model: ModelConfig, sizes: Sizes, index: int) -> int:
    """Bytes that a recomputed layer keeps: what it adds to the stream, which the next one reads."""
    # A dense stream starts with the embeddings twice, which is one tensor.
    tensors = 2 if model.stream == "concat" or (model.stream == "dense" and index > 0) else 1
    return tensors * sizes.tokens * widths(model, 2 * index).branch * sizes.stream


def layer(model: ModelConfig, sizes: Sizes, index: int) -> int:
    """Bytes that the backward pass of one layer needs."""
    attention, feedforward = widths(model, 2 * index), widths(model, 2 * index + 1)
    total = _around(model, sizes, attention) + _attention(model, sizes, attention)
    total += _around(model, sizes, feedforward) + _feedforward(model, sizes, feedforward)
    if model.stream == "dense":  # the output that later averages read, beside the stream
        total += sizes.tokens * model.d_model * sizes.stream
    return total


def ends(model: ModelConfig, sizes: Sizes) -> int:
    """Bytes kept by the embedding, the final norm and the projection, and the indices."""
    end, placement = stream_width(model, model.n_layers), model.axes.placement
    elements = bool(model.embedding_norm) * model.d_model * sizes.parameter
    if placement.final:
        elements += end * sizes.parameter * (2 if model.norm == "dyt" else 1)
    if model.stream == "concat":
        elements += end * sizes.compute
    if model.dropout:
        elements += model.d_model
    return sizes.tokens * (elements + 2 * TOKEN_BYTES)


def merged(model: ModelConfig, sizes: Sizes) -> int:
    """Bytes of the copies that `Concat.settle` makes: `MERGED` chunks of one width become one."""
    if model.stream != "concat":
        return 0
    growth, copied = widths(model, 0).branch, 0
    chunks = [model.d_model]
    for _ in range(model.n_layers):
        chunks += [growth, growth]
        while len(chunks) >= MERGED and len(set(chunks[-MERGED:])) == 1:
            chunks[-MERGED:] = [sum(chunks[-MERGED:])]
            copied += chunks[-1]
    return sizes.tokens * copied * sizes.stream


def _around(model: ModelConfig, sizes: Sizes, width: Widths) -> int:
    """The norms of a sub-layer and its write; on a concatenated stream the chunk it adds, for the rest is recomputed.

    A layer norm keeps its input in the parameter dtype, and a mean and a deviation a token.
    """
    placement, tokens = model.axes.placement, sizes.tokens
    kept_by_norm = sizes.parameter * (2 if model.norm == "dyt" else 1)
    statistics = {"layernorm": 2, "rmsnorm": 1, "dyt": 0}[str(model.norm)] * sizes.parameter
    if model.stream == "concat":
        total = tokens * width.branch * sizes.stream
    else:
        total = tokens * width.read * sizes.compute
        total += placement.before_body * tokens * (width.read * kept_by_norm + statistics)
    total += placement.on_branch * tokens * (width.branch * kept_by_norm + statistics)
    total += placement.after_write * tokens * (width.branch * kept_by_norm + statistics)
    total += (model.stream == "rezero") * tokens * width.branch * sizes.compute
    return total + bool(model.dropout) * tokens * width.branch  # a mask of one byte an element


def _attention(model: ModelConfig, sizes: Sizes, width: Widths) -> int:
    tokens, compute, parameter = sizes.tokens, sizes.compute, sizes.parameter
    d_kv, inner = d_key_value(model), model.axes.maps.rank(model)
    first = width.attention + 2 * d_kv
    total = tokens * (first + width.attention) * compute  # queries, keys, values and their mix
    if model.stream == "concat" and model.reparam != "sigma" and model.attention.position == "rope":
        total += tokens * (first - d_kv) * compute  # the values are a view of all three products
    if inner is not None:
        total += 3 * tokens * inner * compute
    if model.reparam == "sigma":
        total += tokens * (first + width.branch + (3 * inner if inner else 0)) * compute
    if model.attention.qk_norm:
        total += tokens * (width.attention + d_kv + model.n_heads + (model.kv_heads or 0)) * parameter
    if model.axes.placement.before_output:
        total += tokens * width.attention * (compute + _copy(sizes)) + 2 * tokens * parameter
    if model.attention.shaping == "espa":
        total += tokens * width.attention * compute
    return total + _weights(model, sizes)


def _weights(model: ModelConfig, sizes: Sizes) -> int:
    """What softmax attention keeps beside its operands: a number a row, with a cap on the logits whole matrices."""
    parameter, pairs = sizes.parameter, sizes.seq_len**2
    if model.attention.logit_cap:
        cast = sizes.compute if sizes.compute != parameter else 0
        return sizes.sequences * model.n_heads * pairs * (2 * parameter + cast) + pairs
    total = sizes.tokens * model.n_heads * max(4, parameter)
    if model.attention.position == "alibi" and sizes.compute != parameter:
        total += model.n_heads * pairs * sizes.compute
    if model.attention.shaping == "espa":
        total += pairs * sizes.compute
    return total


def _feedforward(model: ModelConfig, sizes: Sizes, width: Widths) -> int:
    assert model.d_ff is not None
    hidden, compute = sizes.tokens * model.d_ff, sizes.compute
    tensors = {"relu": 1, "gelu": 2, "tailored": 2, "swiglu": 4}[str(model.activation)]
    total = tensors * hidden * compute
    if model.reparam == "sigma" and model.axes.reparam.applies(model, 1):
        total += (2 if model.activation == "swiglu" else 1) * hidden * compute
        total += sizes.tokens * width.branch * compute
    if model.axes.placement.before_output:
        total += hidden * (compute + _copy(sizes)) + 2 * sizes.tokens * sizes.parameter
        if model.activation != "relu" and _copy(sizes):
            total -= hidden * compute  # the norm keeps its own copy of the activation's output
    return total


def _copy(sizes: Sizes) -> int:
    """Bytes an element of the copy that a norm makes of what comes in the compute dtype."""
    return sizes.parameter if sizes.compute != sizes.parameter else 0
