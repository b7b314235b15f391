"""A decoder written from the papers' equations with whole attention matrices: gates, softmax variants, shaping.

Of pre-norm layernorm models, or ones without norms, without biases of maps; for float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.softmax_variants import ClippedOptions

Weights = dict[str, Tensor]


def plain_loss(w: Weights, config: ModelConfig, tokens: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies of targets that are not -100."""
    table, share = w["embedding.weight"], config.embedding_gradient_scale
    embedded = table[tokens]
    x = share * embedded + (1 - share) * embedded.detach()
    x = x * {"small_scaled": math.sqrt(config.d_model)}.get(str(config.init), 1.0)
    if config.embedding_norm:
        x = _norm(w, "norm_embedding", config, x)
    for layer in range(config.n_layers):
        x = _layer(w, f"layers.{layer}.", config, x, tokens)
    if config.placement == "pre":
        x = _norm(w, "norm_final", config, x)
    logits = x @ w["head.weight"].T
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)


def _layer(w: Weights, at: str, config: ModelConfig, x: Tensor, tokens: Tensor) -> Tensor:
    def read(sublayer: str, x: Tensor) -> Tensor:
        return _norm(w, f"{at}{sublayer}.norm_in", config, x) if config.placement == "pre" else x

    attended = _attention(w, f"{at}attention.body.", config, read("attention", x), tokens)
    if config.stream in ("simplified", "simplified_parallel"):
        fed = read("feedforward", x if config.stream == "simplified_parallel" else attended)
        return attended + w[f"{at}feedforward.gain"] * _feedforward(w, f"{at}feedforward.body.", config, fed)
    skip = branch = 1.0
    if config.stream == "balanced":
        skip = branch = math.sqrt(0.5)
    x = skip * x + branch * attended
    return skip * x + branch * _feedforward(w, f"{at}feedforward.body.", config, read("feedforward", x))


def _norm(w: Weights, name: str, config: ModelConfig, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], None, config.norm_eps)


def _map(w: Weights, name: str, x: Tensor) -> Tensor:
    """Of one matrix, times its gain if it has one."""
    return x @ w[f"{name}.weight"].T * w.get(f"{name}.matrix_gain", torch.ones(1, dtype=x.dtype))


def _feedforward(w: Weights, at: str, config: ModelConfig, x: Tensor) -> Tensor:
    hidden = _map(w, at + "fc1", x)
    if config.activation == "shaped_relu":
        slope = 1 - 1 / math.sqrt(config.d_model)
        hidden = torch.where(hidden > 0, hidden, slope * hidden) * math.sqrt(2 / (1 + slope**2))
    else:
        hidden = {"gelu": F.gelu, "relu": F.relu}[str(config.activation)](hidden)
    return _map(w, at + "fc2", hidden)


def _attention(w: Weights, at: str, config: ModelConfig, x: Tensor, tokens: Tensor) -> Tensor:
    assert config.kv_heads is not None
    d_head, groups = config.d_model // config.n_heads, config.n_heads // config.kv_heads
    query, key = _map(w, at + "query", x), _map(w, at + "key", x)
    value = _map(w, at + "value", x) if f"{at}value.weight" in w else x
    heads = []
    for head in range(config.n_heads):
        own, shared = (slice(i * d_head, (i + 1) * d_head) for i in (head, head // groups))
        q, k, v = query[..., own], key[..., shared], value[..., shared]
        mixed = _matrix(w, at, config, q, k, tokens, head) @ v
        if config.attention.gate != "none":
            rows = slice(head, head + 1) if config.attention.gate == "headwise" else own
            logits = _map(w, at + "head_gate", x)[..., rows]
            if f"{at}gate_bias" in w:
                logits = logits + w[f"{at}gate_bias"][rows]
            mixed = mixed / (1 + torch.exp(-logits))
        heads.append(mixed)
    whole = torch.cat(heads, dim=-1)
    return _map(w, at + "output", whole) if f"{at}output.weight" in w else whole


def _matrix(w: Weights, at: str, config: ModelConfig, q: Tensor, k: Tensor, tokens: Tensor, head: int) -> Tensor:
    """(batch, seq, seq): what one head multiplies values by."""
    scale = 1 / math.sqrt(q.shape[-1])
    if config.attention.shaping == "shaped":
        scale = scale / math.sqrt(config.d_model)
    if config.attention.position == "rope":
        q, k = _rope(q, config.attention.rope_base), _rope(k, config.attention.rope_base)
    weights = _softmax(w, at, config, q @ k.transpose(1, 2) * scale, tokens, head)
    if config.attention.shaping == "none":
        return weights
    centre = _softmax(w, at, config, torch.zeros_like(weights), tokens, head)
    gains = [
        w[f"{at}{name}"][head] if f"{at}{name}" in w else 1.0 for name in ("own_gain", "average_gain", "centre_gain")
    ]
    eye = torch.eye(weights.shape[1], dtype=weights.dtype)
    return gains[0] * eye + gains[1] * weights - gains[2] * centre


def _softmax(w: Weights, at: str, config: ModelConfig, logits: Tensor, tokens: Tensor, head: int) -> Tensor:
    seq_len, attention = tokens.shape[1], config.attention
    place = torch.arange(seq_len)
    if attention.logit_cap:
        logits = attention.logit_cap * torch.tanh(logits / attention.logit_cap)
    if attention.position == "alibi":
        slope = 2.0 ** (-8 * (head + 1) / config.n_heads)
        logits = logits - slope * (place[:, None] - place)
    seen = (place[:, None] >= place).expand(len(tokens), -1, -1)
    if attention.document_end is not None:
        ends = (tokens == attention.document_end).long()
        number = ends.cumsum(1) - ends
        seen = seen & (number[:, :, None] == number[:, None, :])
    powers = torch.where(seen, logits.exp(), 0.0)
    extra = {"off_by_one": torch.ones(()), "sink": w.get(f"{at}sink", torch.zeros(config.n_heads))[head].exp()}
    weights = powers / (powers.sum(-1, keepdim=True) + extra.get(str(attention.softmax), 0.0))
    if attention.softmax == "clipped":
        assert config.max_seq_len is not None
        options = config.option(ClippedOptions)
        gamma = -options.alpha / config.max_seq_len
        weights = torch.clip((options.zeta - gamma) * weights + gamma, 0, 1) * seen
    return weights


def _rope(x: Tensor, base: float) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * base ** -(torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1)
