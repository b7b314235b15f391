"""A stack of sub-layers drawn at random from the widths and gains that the theory is given, in plain torch."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.theory.attention import AttentionBody
from stablelm.theory.kernels import FeedForwardBody, NormTheory
from stablelm.theory.moments import LeakyRelu
from stablelm.theory.propagation import End, SublayerTheory


class Measured(NamedTuple):
    """By layer boundary 0 .. N, as in `theory.propagation.Trace`."""

    stream_variance: np.ndarray
    token_correlation: np.ndarray
    attention_branch_variance: np.ndarray
    feedforward_branch_variance: np.ndarray
    attention_entropy: np.ndarray
    gradient_variance: np.ndarray


class Draw:
    """Gaussian matrices with the variance that a gain asks for."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, d_in: int, d_out: int, gain: float) -> Tensor:
        return torch.randn(d_in, d_out, generator=self.generator) * math.sqrt(gain / d_in)


def normalise(norm: NormTheory | None, x: Tensor) -> Tensor:
    if norm is None:
        return x
    if norm.alpha is not None:
        return norm.scale * torch.tanh(norm.alpha * x)
    if not norm.centred:
        return norm.scale * F.rms_norm(x, x.shape[-1:])
    return norm.scale * F.layer_norm(x, x.shape[-1:], eps=norm.eps)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def attend(
    body: AttentionBody, inputs: tuple[Tensor, Tensor, Tensor], *, heads: int, d_out: int, draw: Draw,
    first: Tensor | None = None,
) -> tuple[Tensor, float, Tensor]:  # fmt: skip
    """Inputs of queries, keys, values (batch, T, d) -> branch (batch, T, d_out), mean entropy of the rows, values."""
    d_attention, pattern = heads * body.d_head, body.pattern
    gains = (body.query_gain, body.key_gain, body.value_gain)
    query, key, value = (x @ draw.matrix(x.shape[-1], d_attention, gain) for x, gain in zip(inputs, gains, strict=True))
    if body.value_mix is not None and first is not None:
        value = (1 - body.value_mix) * value + body.value_mix * first
    query, key, split = (y.unflatten(-1, (heads, body.d_head)).transpose(1, 2) for y in (query, key, value))
    if body.qk_norm:
        query, key = F.rms_norm(query, query.shape[-1:]), F.rms_norm(key, key.shape[-1:])
    if pattern.rotary is not None:
        angles = torch.outer(torch.arange(query.shape[2]), torch.from_numpy(pattern.rotary)).float()
        query, key = _turn(query, angles), _turn(key, angles)
    logits = query @ key.transpose(-1, -2) * body.scale
    if body.logit_cap is not None:
        logits = body.logit_cap * torch.tanh(logits / body.logit_cap)
    bias = torch.from_numpy(pattern.log_weights).float()
    logits = logits + bias.repeat_interleave(heads // len(bias), dim=0)
    if body.null_logit is not None:
        logits = F.pad(logits, (1, 0), value=body.null_logit)
    weights = logits.softmax(dim=-1)[..., -split.shape[2] :]
    entropy = float(torch.special.entr(weights.detach()).sum(dim=-1).mean())
    mixed = F.dropout(weights, body.dropout) @ split
    if body.centred:
        mixed = mixed + split - bias.softmax(dim=-1).repeat_interleave(heads // len(bias), dim=0) @ split
    if body.gate is not None:
        gates = torch.sigmoid(inputs[0].detach() @ draw.matrix(inputs[0].shape[-1], d_attention, body.gate_gain))
        mixed = mixed * gates.unflatten(-1, (heads, -1)).transpose(1, 2)
    if pattern.row_scale is not None:
        mixed = mixed * torch.from_numpy(pattern.row_scale).float()[:, None]
    mixed = normalise(body.inner_norm, mixed.transpose(1, 2).flatten(-2))
    return mixed @ draw.matrix(d_attention, d_out, body.output_gain), entropy, value


def feed(body: FeedForwardBody, x: Tensor, d_ff: int, d_out: int, draw: Draw) -> Tensor:
    """x: (batch, T, d) -> the branch (batch, T, d_out)."""
    hidden = x @ draw.matrix(x.shape[-1], d_ff, body.fc1_gain)
    if body.gated:
        hidden = F.silu(x @ draw.matrix(x.shape[-1], d_ff, body.gate_gain)) * hidden
    elif isinstance(body.function, LeakyRelu):
        hidden = F.leaky_relu(hidden, body.function.slope)
    else:
        hidden = F.gelu(hidden)
    hidden = normalise(body.inner_norm, hidden * body.output_scale)
    return hidden @ draw.matrix(d_ff, d_out, body.fc2_gain)


def simulate(
    stream: Tensor, targets: Tensor, sublayers: list[SublayerTheory], end: End, *, heads: int, d_ff: int, vocab: int,
    seed: int,
) -> Measured:  # fmt: skip
    """Runs one draw of the stack forward and backward; stream: (batch, T, d), targets: (batch, T)."""
    draw, first = Draw(seed), None
    x = stream.clone().requires_grad_(True)
    states, attention, feedforward, entropies = [x], [math.nan], [math.nan], [math.nan]
    torch.manual_seed(seed)  # dropout
    for i, sublayer in enumerate(sublayers):
        inside = normalise(sublayer.norm_in, x)
        width = x.shape[-1] if sublayer.concat is None else sublayer.concat[1]
        if isinstance(sublayer.body, AttentionBody):
            inputs = (inside, inside, inside)
            branch, entropy, values = attend(sublayer.body, inputs, heads=heads, d_out=width, draw=draw, first=first)
            first = values if first is None else first
            entropies.append(entropy)
        else:
            branch = feed(sublayer.body, inside, d_ff, width, draw)
        branch = F.dropout(normalise(sublayer.norm_branch, branch), sublayer.dropout)
        (feedforward if i % 2 else attention).append(float(branch.detach().square().mean()))
        x = sublayer.keep * x + sublayer.write * branch if sublayer.concat is None else torch.cat([x, branch], dim=-1)
        x = normalise(sublayer.norm_after, x)
        x.retain_grad()
        if i % 2:
            states.append(x)
    hidden = normalise(end.norm, x).flatten(0, 1)
    F.cross_entropy(hidden @ draw.matrix(hidden.shape[-1], vocab, 1.0), targets.flatten()).backward()
    gradients = [float(state.grad.square().mean()) for state in states if state.grad is not None]
    states = [state.detach() for state in states]
    columns = (
        [float(state.square().mean()) for state in states],
        [correlation(state) for state in states],
        attention,
        feedforward,
        entropies,
        gradients,
    )
    return Measured(*(np.array(column) for column in columns))


def correlation(x: Tensor) -> float:
    """Mean cosine over pairs of positions; x: (batch, T, d)."""
    unit, size = F.normalize(x, dim=-1), x.shape[1]
    return float(((unit @ unit.transpose(1, 2)).sum(dim=(1, 2)) - size).mean() / (size * (size - 1)))
