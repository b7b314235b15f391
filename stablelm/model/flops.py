"""Parameters and floating-point operations of a resolved model config, in closed form (torch-free)."""

from stablelm.config.schema import ModelConfig
from stablelm.methods.placement import make_placement
from stablelm.methods.widths import Widths, d_head, d_key_value, rank, stream_width, widths


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters.

    `total`: distinct parameters; `embedding`: token table and learned positions; `head`: 0 when tied;
    `layers`: all in the layers; `matmul`: those a token is multiplied with (matrices of the layers, the
    projection of a concatenated stream and the head, tied or not).
    """
    assert config.vocab_size is not None
    assert config.max_seq_len is not None
    placement = make_placement(config)
    if config.stream == "concat":
        matrices, others = (
            sum(both) for both in zip(*(_layer(config, i) for i in range(config.n_layers)), strict=True)
        )
    else:
        matrices, others = (config.n_layers * one for one in _layer(config, 0))
    if config.stream == "dense":
        others += sum(range(2, config.n_layers + 2))
    end = stream_width(config, config.n_layers)
    projection = end * config.d_model if config.stream == "concat" else 0
    norms = placement.final * _norm(config, end) + bool(config.embedding_norm) * _norm(config, config.d_model)
    vocabulary = config.vocab_size * config.d_model
    embedding = vocabulary + (config.max_seq_len * config.d_model if config.attention.position == "learned" else 0)
    head = 0 if config.tie_embeddings else vocabulary
    return {
        "total": embedding + matrices + others + norms + projection + head,
        "embedding": embedding,
        "head": head,
        "layers": matrices + others,
        "matmul": matrices + projection + vocabulary,
    }


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations a trained token, forward and backward, recompute not counted.

    6 x matmul parameters plus causal attention: two products of seq_len / 2 keys on average, 2 operations
    each, three times for the two passes: 6 n_layers seq_len d_attention (Chowdhery et al. 2022, appendix B, halved).
    """
    attention = 6.0 * config.n_layers * seq_len * widths(config, 0).attention
    return 6.0 * parameter_counts(config)["matmul"] + attention


def _layer(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Elements of a layer's matrices, and of all else in it but a dense stream's averages."""
    attention, feedforward = widths(config, 2 * layer), widths(config, 2 * layer + 1)
    pairs = (_attention(config, attention), _feedforward(config, feedforward))
    return sum(matrix for matrix, _ in pairs), sum(other for _, other in pairs)


def _attention(config: ModelConfig, width: Widths) -> tuple[int, int]:
    d_kv, inner = d_key_value(config), rank(config)
    shapes = [(width.read, out) for out in (width.attention, d_kv, d_kv)]
    matrix = sum(d_in * d_out if inner is None else inner * (d_in + d_out) for d_in, d_out in shapes)
    matrix += width.attention * width.branch
    maps = 4 if inner is None else 7
    others = maps if config.reparam == "sigma" else 0
    others += width.attention + 2 * d_kv + width.branch if config.bias else 0
    others += 2 * d_head(config) if config.attention.qk_norm else 0
    return matrix, others + _norms(config, width, width.attention)


def _feedforward(config: ModelConfig, width: Widths) -> tuple[int, int]:
    assert config.d_ff is not None
    wide = 2 if config.activation == "swiglu" else 1
    matrix = wide * width.read * config.d_ff + config.d_ff * width.branch
    others = wide + 1 if config.reparam == "sigma" and config.sigma.targets == "all" else 0
    others += wide * config.d_ff + width.branch if config.bias else 0
    return matrix, others + _norms(config, width, config.d_ff)


def _norms(config: ModelConfig, width: Widths, inner: int) -> int:
    """The norms of a sub-layer by placement, and rezero's gain."""
    placement = make_placement(config)
    counted = placement.before_body * _norm(config, width.read) + placement.before_output * _norm(config, inner)
    counted += (placement.on_branch + placement.after_write) * _norm(config, width.branch)
    return counted + (config.stream == "rezero")


def _norm(config: ModelConfig, width: int) -> int:
    has_bias = bool(config.bias) and config.norm != "rmsnorm"
    return width * (1 + has_bias) + (config.norm == "dyt")
