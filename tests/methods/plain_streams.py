"""The streams of the newer methods a second time, from their papers' equations, token-wise sums written out."""

import math
from collections.abc import Callable

import torch
from model.plain_decoder import _feedforward, _norm, _rope
from torch import Tensor

from stablelm.config.schema import ModelConfig

Weights = dict[str, Tensor]
Body = Callable[[int, Tensor], Tensor]
"""A sub-layer by its number and what it reads, its norm included."""


def attention(w: Weights, at: str, config: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention whose three maps have inputs of their own, (batch, seq, d_model) each."""
    assert config.kv_heads is not None
    seq_len, heads, kv_heads = q.shape[1], config.n_heads, config.kv_heads
    query, key, value = (x @ w[f"{at}{name}.weight"].T for name, x in (("query", q), ("key", k), ("value", v)))
    d_head, mixed = query.shape[-1] // heads, []
    hidden = torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1)
    for head in range(heads):
        own, shared = (slice(i * d_head, (i + 1) * d_head) for i in (head, head * kv_heads // heads))
        qh, kh = query[..., own], key[..., shared]
        if config.attention.qk_norm:
            qh, kh = (
                x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{at}norm_{name}.weight"]
                for name, x in (("query", qh), ("key", kh))
            )
        qh, kh = _rope(qh, config.attention.rope_base), _rope(kh, config.attention.rope_base)
        logits = (qh @ kh.mT / math.sqrt(d_head)).masked_fill(hidden, -math.inf)
        mixed.append(logits.softmax(-1) @ value[..., shared])
    return torch.cat(mixed, dim=-1) @ w[f"{at}output.weight"].T


def body(w: Weights, config: ModelConfig, index: int, x: Tensor) -> Tensor:
    """A pre-norm sub-layer's branch."""
    at = f"layers.{index // 2}.{'feedforward' if index % 2 else 'attention'}."
    x = _norm(w, f"{at}norm_in", config, x)
    return _feedforward(w, f"{at}body.", config, x) if index % 2 else attention(w, f"{at}body.", config, x, x, x)


def final(w: Weights, config: ModelConfig, x: Tensor) -> Tensor:
    return _norm(w, "norm_final", config, x)


def _of(w: Weights, index: int) -> Weights:
    """What the stream adds to a sub-layer."""
    at = f"layers.{index // 2}.{'feedforward' if index % 2 else 'attention'}."
    return {name.removeprefix(at): value for name, value in w.items() if name.startswith(at)}


def hyper_connections(w: Weights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Algorithm 2 of Zhu et al.: alpha (n, n + 1) and beta (n,) of each token, one copy after the other."""
    x = w["embedding.weight"][tokens]
    n = len(_of(w, 0)["static_read"])
    copies = [x] * n
    for index in range(2 * config.n_layers):
        own = _of(w, index)
        alpha = torch.cat((own["static_read"][:, None], own["static_mix"].view(n, n)), dim=1)
        rows = [alpha[i].expand(*x.shape[:2], n + 1) for i in range(n)]
        beta = [b.expand(x.shape[:2]) for b in own["static_write"]]
        if "dynamic_map" in own:
            for i, h in enumerate(copies):
                centred = h - h.mean(-1, keepdim=True)
                normed = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
                found = torch.tanh((normed * own["dynamic_norm"]) @ own["dynamic_map"])
                rows[i] = rows[i] + own["dynamic_scales"][0] * found[..., : n + 1]
                beta[i] = beta[i] + own["dynamic_scales"][1] * found[..., n + 1]
        mixed = [sum(rows[i][..., j, None] * copies[i] for i in range(n)) for j in range(n + 1)]
        branch = body(w, config, index, mixed[0])  # type: ignore[arg-type]
        copies = [mixed[1 + j] + beta[j][..., None] * branch for j in range(n)]
    return final(w, config, sum(copies) / n)  # type: ignore[arg-type]


def mhc(w: Weights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Equations 3, 7, 8 and 9 of Xie et al., with 20 iterations."""
    x = w["embedding.weight"][tokens]
    n = len(_of(w, 0)["static_read"])
    stream = torch.stack([x] * n, dim=2)  # (batch, seq, n, d)
    for index in range(2 * config.n_layers):
        own = _of(w, index)
        vector = stream.reshape(*x.shape[:2], -1)
        vector = vector / (vector.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        pre, post, res = (vector @ own["dynamic_map"]).split([n, n, n * n], dim=-1)
        pre = torch.sigmoid(own["dynamic_scales"][0] * pre + own["static_read"])
        post = 2 * torch.sigmoid(own["dynamic_scales"][1] * post + own["static_write"])
        m = torch.exp(own["dynamic_scales"][2] * res + own["static_mix"]).unflatten(-1, (n, n))
        for _ in range(20):
            m = m / m.sum(-2, keepdim=True)
            m = m / m.sum(-1, keepdim=True)
        branch = body(w, config, index, (pre[..., None] * stream).sum(2))
        stream = (m[..., None] * stream[:, :, None]).sum(3) + post[..., None] * branch[:, :, None]
    return final(w, config, stream.mean(2))


def muddformer(w: Weights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """The released forward pass of Xiao et al.: hidden states of all layers, weights way by way."""
    x = w["embedding.weight"][tokens]
    outputs, (query, key, value, residual) = [x], [x] * 4
    for layer in range(config.n_layers):
        at = f"layers.{layer}.attention."
        names = [f"{at}norm_in{suffix if layer else ''}" for suffix in ("", "_1", "_2")]
        read = [_norm(w, name, config, each) for name, each in zip(names, (query, key, value), strict=True)]
        x = residual + attention(w, f"{at}body.", config, *read)
        x = x + body(w, config, 2 * layer + 1, x)
        outputs.append(x)
        weights = w[f"layers.{layer}.mix"].expand(*x.shape[:2], -1)
        if f"layers.{layer}.mix_hidden" in w:
            normed = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            hidden = normed @ w[f"layers.{layer}.mix_hidden"].T
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            weights = weights + hidden @ w[f"layers.{layer}.mix_out"].T
        ways = torch.einsum("btcl,lbtd->cbtd", weights.unflatten(-1, (-1, layer + 2)), torch.stack(outputs))
        query, key, value, residual = ways if len(ways) == 4 else [ways[0]] * 4
    return final(w, config, residual)


def attention_residuals(w: Weights, config: ModelConfig, tokens: Tensor, block: int = 1) -> Tensor:
    """Equations 2 to 6 of the Kimi Team; the query after sub-layer i is that of what is read next."""
    x = w["embedding.weight"][tokens]
    full, begun = [x], None
    for index in range(2 * config.n_layers):
        own, branch = _of(w, index), body(w, config, index, x)
        begun = branch if begun is None else begun + branch
        values = torch.stack([*full, begun])
        keys = values / (values.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * own["depth_gain"]
        x = torch.einsum("nbt,nbtd->btd", torch.einsum("d,nbtd->nbt", own["depth_query"], keys).softmax(0), values)
        if (index + 1) % block == 0:
            full, begun = [*full, begun], None
    return final(w, config, x)


def gtrxl(w: Weights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Equations of section 3.2 of Parisotto et al., each gate's matrices by themselves."""
    x = w["embedding.weight"][tokens]
    for index in range(2 * config.n_layers):
        own, y = _of(w, index), body(w, config, index, x).clamp(min=0)
        w_r, w_z, w_g = own["gate_branch"].chunk(3)
        u_r, u_z = own["gate_stream"].chunk(2)
        r = torch.sigmoid(y @ w_r.T + x @ u_r.T)
        z = torch.sigmoid(y @ w_z.T + x @ u_z.T - own["gate_bias"])
        h = torch.tanh(y @ w_g.T + (r * x) @ own["gate_reset"].T)
        x = (1 - z) * x + z * h
    return final(w, config, x)
