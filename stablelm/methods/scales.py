"""The numbers that multiply skips, branches, logits, embeddings and the head's input (torch-free, float64)."""

import math

from stablelm.config.schema import ModelConfig
from stablelm.methods.widths import d_head


def skip_and_branch(config: ModelConfig) -> tuple[float, float]:
    """(skip, branch) of x <- skip x + branch f(x); for a concatenated stream (1, 1): nothing is scaled.

    scaled: lambda, beta with beta^2 = k / n_layers, lambda^2 = 1 - beta^2 (Kedia et al. 2024, section 4);
    deepnorm: alpha = (2 n_layers)^(1/4), 1 (Wang et al. 2022, section 3, decoder-only);
    completep: 1, (n_layers / base_depth)^-alpha (Dey et al. 2025, table 1); skipless: 0, 1.
    """
    if config.stream == "scaled":
        beta_squared = config.deepscale.k / config.n_layers
        return math.sqrt(1 - beta_squared), math.sqrt(beta_squared)
    if config.stream == "deepnorm":
        return (2 * config.n_layers) ** 0.25, 1.0
    if config.stream == "completep":
        return 1.0, depth_ratio(config) ** -config.completep.alpha
    if config.stream == "skipless":
        return 0.0, 1.0
    return 1.0, 1.0


def depth_ratio(config: ModelConfig) -> float:
    """m_L = n_layers / base_depth (Dey et al. 2025)."""
    return config.n_layers / config.completep.base_depth


def width_ratio(config: ModelConfig) -> float:
    """m_N = d_model / base_width (Dey et al. 2025)."""
    return config.d_model / config.completep.base_width


def logit_scale(config: ModelConfig) -> float:
    """What multiplies query . key: 1 / sqrt(d_head); with init completep 1 / d_head (Dey et al. 2025, table 1)."""
    width = d_head(config)
    return 1 / width if config.init == "completep" else width**-0.5


def embedding_scale(config: ModelConfig) -> float:
    """What multiplies the token embeddings: sqrt(d_model) for magneto and deepnet, whose tables have std d_model^-1/2.

    As in fairseq's and torchscale's language models; the stream then starts with unit variance.
    """
    return math.sqrt(config.d_model) if config.init in ("magneto", "deepnet") else 1.0


def head_scale(config: ModelConfig) -> float:
    """What multiplies the head's input.

    With a tied head, 1 / (std sqrt(d)) gives unit logits where the embeddings set the stream's variance
    (Kedia et al. 2024, released code); completep: 1 / m_N (Dey et al. 2025, table 1).
    """
    if config.init == "completep":
        return 1 / width_ratio(config)
    if config.tie_embeddings and config.init in ("deepscale", "unit", "fan_in", "orthogonal"):
        return 1 / (embedding_std(config) * math.sqrt(config.d_model))
    return 1.0


def embedding_std(config: ModelConfig) -> float:
    """Std of the token and position tables.

    deepscale: (1 - dropout) / tables is the variance, so that the sum has variance 1 after dropout (Kedia et al.
    2024); unit, fan_in and orthogonal the same; gpt2 and completep: 0.02; tfixup: (9 n_layers)^-1/4 / sqrt(d_model)
    (Huang et al. 2020, section 3.2); else 1 / sqrt(d_model).
    """
    if config.init in ("deepscale", "unit", "fan_in", "orthogonal"):
        tables = 2 if config.attention.position == "learned" else 1
        return math.sqrt((1 - config.dropout) / tables)
    if config.init in ("gpt2", "completep"):
        return 0.02
    if config.init == "tfixup":
        return (9 * config.n_layers) ** -0.25 * config.d_model**-0.5
    return config.d_model**-0.5
