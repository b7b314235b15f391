"""A second decoder, written from the equations with plain torch operations, and small configs for both."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import apply_method
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise

HEADS: dict[str, Any] = {"n_heads": 4, "kv_heads": 4}
SIZES: dict[str, Any] = HEADS | {"n_layers": 3, "d_model": 32, "max_seq_len": 24, "vocab_size": 96}


def small_config(method: str = "pre_ln", *, position: str | None = None, **keys: Any) -> ModelConfig:
    """A resolved config of 3 layers of width 32, unless `keys` say otherwise."""
    sizes = SIZES | keys
    model = apply_method(ModelConfig(method=method, **sizes))
    if position is not None:
        model = replace(model, attention=replace(model.attention, position=position))
    return model.axes.stream.sized(model)


def build(config: ModelConfig, precision: str = "fp32", seed: int = 0) -> Decoder:
    """An initialised decoder on the CPU, with gains and biases moved off 1 and 0 so that they matter."""
    decoder = Decoder(config, precision)
    initialise(decoder, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            assert parameter.isfinite().all(), name
    return decoder


def sample(config: ModelConfig, batch: int = 2, seq_len: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (batch, seq_len), a few of the targets ignored."""
    assert config.vocab_size is not None
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.vocab_size, (batch, seq_len + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[0, -3:] = -100
    return text[:, :-1], targets


def plain_logits(w: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """(batch, seq) -> (batch, seq, vocab) from named weights; dropout off."""
    x = w["embedding.weight"][tokens]
    if config.attention.position == "learned":
        x = x + w["position.weight"][: tokens.shape[1]]
    for layer in range(config.n_layers):
        for sublayer, body in (("attention", _attention), ("feedforward", _feedforward)):
            at = f"layers.{layer}.{sublayer}."
            if config.placement == "pre":
                x = x + body(w, at + "body.", config, _norm(w, at + "norm_in", config, x))
            else:
                x = _norm(w, at + "norm_out", config, x + body(w, at + "body.", config, x))
    if config.placement == "pre":
        x = _norm(w, "norm_final", config, x)
    return x @ w["embedding.weight" if config.tie_embeddings else "head.weight"].T


def plain_sums(w: dict[str, Tensor], config: ModelConfig, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of cross-entropy and of log(Z)^2 over valid targets, from whole logits."""
    logits = plain_logits(w, config, tokens).flatten(0, 1)
    flat = targets.flatten()
    cross_entropy = torch.nn.functional.cross_entropy(logits, flat, reduction="sum", ignore_index=-100)
    return cross_entropy, torch.logsumexp(logits[flat != -100], dim=-1).square().sum()


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def _norm(w: dict[str, Tensor], name: str, config: ModelConfig, x: Tensor) -> Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[name + ".weight"]
    return y + w[name + ".bias"] if name + ".bias" in w else y


def _attention(w: dict[str, Tensor], at: str, config: ModelConfig, x: Tensor) -> Tensor:
    assert config.kv_heads is not None
    seq_len, d = x.shape[1:]
    d_head, groups = d // config.n_heads, config.n_heads // config.kv_heads
    heads = []
    for head in range(config.n_heads):
        own = slice(head * d_head, (head + 1) * d_head)
        shared = slice(head // groups * d_head, (head // groups + 1) * d_head)
        q = _linear(w, at + "query", x)[..., own]
        k = _linear(w, at + "key", x)[..., shared]
        v = _linear(w, at + "value", x)[..., shared]
        if config.attention.position == "rope":
            q, k = _rope(q, config.attention.rope_base), _rope(k, config.attention.rope_base)
        logits = q @ k.transpose(1, 2) / math.sqrt(d_head)
        future = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
        heads.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v)
    return _linear(w, at + "output", torch.cat(heads, dim=-1))


def _rope(x: Tensor, base: float) -> Tensor:
    """Each pair (i, i + half) as a complex number, turned by its angle."""
    half = x.shape[-1] // 2
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def _feedforward(w: dict[str, Tensor], at: str, config: ModelConfig, x: Tensor) -> Tensor:
    h = _linear(w, at + "fc1", x)
    if config.activation == "swiglu":
        g = _linear(w, at + "gate", x)
        h = g * g.sigmoid() * h
    elif config.activation == "gelu":
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
    else:
        h = h.clamp(min=0)
    return _linear(w, at + "fc2", h)
