"""Parameters and floating-point operations of a resolved model config, in closed form."""

from stablelm.config.schema import ModelConfig
from stablelm.methods.placement import make_placement


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Numbers of parameters.

    `total`: distinct parameters; `embedding`: token table and learned positions; `head`: 0 when tied;
    `layers`: all in the layers; `matmul`: those a token is multiplied with (matrices of the layers and the
    head, tied or not).
    """
    assert config.vocab_size is not None
    assert config.max_seq_len is not None
    placement = make_placement(config)
    matrix, bias = _layer_matrices(config)
    norm = config.d_model * (2 if config.bias and config.norm == "layernorm" else 1)
    norms_per_layer = 2 * (placement.before_body + placement.after_write)
    layers = config.n_layers * (matrix + bias + norms_per_layer * norm)
    vocabulary = config.vocab_size * config.d_model
    embedding = vocabulary + (config.max_seq_len * config.d_model if config.attention.position == "learned" else 0)
    head = 0 if config.tie_embeddings else vocabulary
    return {
        "total": embedding + layers + placement.final * norm + head,
        "embedding": embedding,
        "head": head,
        "layers": layers,
        "matmul": config.n_layers * matrix + vocabulary,
    }


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Operations a trained token, forward and backward, recompute not counted.

    6 x matmul parameters plus causal attention: two products of seq_len / 2 keys on average, 2 operations
    each, three times for the two passes: 6 n_layers seq_len d_model (Chowdhery et al. 2022, appendix B, halved).
    """
    return 6.0 * parameter_counts(config)["matmul"] + 6.0 * config.n_layers * seq_len * config.d_model


def _layer_matrices(config: ModelConfig) -> tuple[int, int]:
    """Elements of one layer's matrices and of their biases."""
    assert config.kv_heads is not None
    assert config.d_ff is not None
    d, d_ff, d_kv = config.d_model, config.d_ff, config.kv_heads * (config.d_model // config.n_heads)
    wide = 2 if config.activation == "swiglu" else 1
    matrix = 2 * d * d + 2 * d * d_kv + (wide + 1) * d * d_ff
    bias = 2 * d + 2 * d_kv + wide * d_ff + d
    return matrix, bias if config.bias else 0
