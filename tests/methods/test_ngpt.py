"""nGPT against its equations, its matrices of length 1 after each update, its start against the theory."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.parity import assert_parity
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.methods import spectral
from stablelm.methods.ngpt import UnitLength
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import decays, initialise, roles
from stablelm.observe.layers import Recorder
from stablelm.probe.predict import predict

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
SIZES = ("model.n_layers=3", "model.d_model=32", "model.n_heads=4", "data.seq_len=12", "train.steps=9")
WRITING = ("output.weight", "fc2.weight")


def config(*overrides: str) -> Config:
    found = load([], ["model.method=ngpt", *SIZES, "train.precision=fp64", "train.global_batch_size=4", *overrides])
    return resolve(found.config, pieces=64, world_size=1, accelerate_precision=None)


def moved(found: Config) -> Decoder:
    """With vectors that are no constants."""
    decoder = Decoder(found.model, "fp64")
    initialise(decoder, found.model, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return decoder


def turned(x: Tensor) -> Tensor:
    """x: (batch, seq, heads, width), by the angles of rotary positions."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 10000.0 ** -(torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def length_1(x: Tensor, dim: int = -1) -> Tensor:
    return x / x.pow(2).sum(dim, keepdim=True).sqrt()


def plain_loss(
    w: dict[str, Tensor], tokens: Tensor, targets: Tensor, *, layers: int, heads: int, groups: int
) -> Tensor:
    """Equations 3 to 21 of the paper, written out: h is of length 1, alpha_init 0.05, scales d^-1/2, 1 for s_u, s_v."""
    d = w["embedding.weight"].shape[1]
    root, batch, seq = math.sqrt(d), *tokens.shape
    h = w["embedding.weight"][tokens]
    mask = torch.full((seq, seq), -math.inf, dtype=h.dtype).triu(1)
    for layer in range(layers):
        at = f"layers.{layer}.attention."
        q, k, v = (h @ w[f"{at}body.{name}.weight"].T for name in ("query", "key", "value"))
        q, k, v = (part.view(batch, seq, -1, d // heads) for part in (q, k, v))
        s_qk = (w[at + "body.scale_qk"] * root).view(heads, d // heads)
        k, v = (part.repeat_interleave(heads // groups, dim=2) for part in (k, v))
        q, k = length_1(turned(q)) * s_qk, length_1(turned(k)) * s_qk
        weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * math.sqrt(d // heads) + mask).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, seq, d)
        alpha = (w[at + "alpha"] * 0.05 * root).abs()
        h = length_1(h + alpha * (length_1(mixed @ w[at + "body.output.weight"].T) - h))
        at = f"layers.{layer}.feedforward."
        u = h @ w[at + "body.fc1.weight"].T * w[at + "body.scale_u"]
        gate = h @ w[at + "body.gate.weight"].T * w[at + "body.scale_v"] * root
        made = (u * gate * torch.sigmoid(gate)) @ w[at + "body.fc2.weight"].T
        alpha = (w[at + "alpha"] * 0.05 * root).abs()
        h = length_1(h + alpha * (length_1(made) - h))
    logits = h @ w["head.weight"].T * (w["head.scale_z"] * root)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("groups", [4, 2])
def test_loss_and_gradients_are_those_of_the_equations(groups, record_property):
    found = config(f"model.kv_heads={groups}")
    decoder = moved(found)
    text = torch.randint(64, (2, 13), generator=torch.Generator().manual_seed(2))
    weights = {name: p.detach().clone().requires_grad_() for name, p in decoder.named_parameters()}
    wanted = plain_loss(weights, text[:, :-1], text[:, 1:], layers=3, heads=4, groups=groups)
    wanted.backward()
    sums: Any = decoder(text[:, :-1], text[:, 1:])
    sums.total.backward()
    gradients = {name: (parameter.grad, weights[name].grad) for name, parameter in decoder.named_parameters()}
    assert_parity(record_property, "ngpt", (sums.total, wanted), gradients)


def assert_of_length_1(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            lengths = tensor.norm(dim=0 if name.endswith(WRITING) else 1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=1e-6, msg=name)


def test_matrices_have_length_1_along_the_embedding_dimension_at_the_start_and_after_updates():
    """An update is AdamW's without decay, and then the division by the lengths."""
    found = config("train.grad_clip=0")
    engine = TorchEngine(found, "single", SINGLE)
    before = {name: p.detach().clone() for name, p in engine.parameters().items()}
    assert_of_length_1(before)
    own = [torch.nn.Parameter(value) for value in before.values()]
    plain = torch.optim.AdamW(own, lr=1e-2, betas=found.train.betas, eps=found.train.eps, weight_decay=0.0)
    for step in range(2):
        text = torch.randint(64, (4, 13), generator=torch.Generator().manual_seed(step))
        engine.backward(engine.loss(text[:, :-1], text[:, 1:]).total / 48, last=True)
        for parameter, gradient in zip(own, engine.gradients().values(), strict=True):
            parameter.grad = gradient
        plain.step()
        engine.step(1e-2)
        for (name, value), parameter in zip(engine.parameters().items(), own, strict=True):
            if parameter.ndim == 2:
                parameter.data = length_1(parameter.data, 0 if name.endswith(WRITING) else 1)
            torch.testing.assert_close(value.detach(), parameter.detach(), rtol=1e-9, atol=1e-12, msg=name)
    assert_of_length_1({name: p.detach() for name, p in engine.parameters().items()})


def test_nothing_decays():
    decoder = moved(config())
    assert not any(map(decays, roles(decoder).values()))


def test_parts_of_a_matrix_give_the_same_factors():
    """Rows of FSDP2 and ranges of ZeRO-3, each with a share of the sums."""
    matrix = torch.randn(6, 5, dtype=torch.float64)
    v, u, sigma = (torch.empty(n, device="meta") for n in (6, 5, 1))
    for writes in (False, True):
        whole = UnitLength().update([spectral.Matrix(matrix, 0, u, v, sigma, writes)], None)[0]
        rows = [
            spectral.Matrix(matrix[:4], 0, u, v, sigma, writes),
            spectral.Matrix(matrix[4:], 4, u, v, sigma, writes),
        ]
        flat = matrix.flatten()
        ranges = [spectral.Slice(flat[a:b], a, u, v, sigma, writes) for a, b in ((0, 7), (7, 8), (8, 30))]
        for parts in (rows, ranges):
            sums: list[Tensor] = []
            for part in parts:
                UnitLength().update([part], sums.append)
            total = torch.stack(sums).sum(0)
            torch.testing.assert_close(total.rsqrt(), whole.flatten())


def test_the_start_is_as_predicted():
    found = config("model.n_layers=12", "model.d_model=128", "data.seq_len=64").model
    decoder = Decoder(found, "fp64")
    initialise(decoder, found, 0)
    text = torch.randint(64, (4, 65), generator=torch.Generator().manual_seed(0))
    with Recorder(decoder) as recorder:
        sums: Any = decoder(text[:, :-1], text[:, 1:])
        (sums.total / sums.valid).backward()
        rows = recorder.rows()
    predicted = predict(found, seq_len=64, tokens=256, collision=1 / 64)
    variance = np.array([float(row["stream_variance"]) for row in rows])
    np.testing.assert_allclose(variance, predicted.stream_variance, rtol=0.05)
    np.testing.assert_allclose(variance * 128, 1, rtol=1e-6)
    correlation = np.array([float(row["token_correlation"]) for row in rows])
    np.testing.assert_allclose(correlation, predicted.token_correlation, atol=0.05)
    gradients = np.array([float(norm) for norm in recorder.gradients])
    np.testing.assert_allclose(gradients, predicted.gradient_norm, rtol=0.1)


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("model.tie_embeddings=true", "model.tie_embeddings=false"),
        ("model.attention.qk_norm=true", "model.attention.qk_norm=false"),
        ("model.init=xavier", "model.init=unit_length"),
        ("model.attention.low_rank=0.5", "model.attention.low_rank=0"),
        ("model.placement=sub", "model.norm=rmsnorm"),
        ("model.stream=concat", "model.norm=rmsnorm"),
    ],
)
def test_what_is_refused_is_fixed(override, fix):
    with pytest.raises(ConfigError, match=fix):
        config(override)
