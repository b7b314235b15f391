"""Magneto (Sub-LN) and DeepNorm: their constants, their sub-layers against the equations, what they do at the start."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.positions import rotation_table
from stablelm.methods.sizes import d_head, parameter_counts
from stablelm.model.attention.positions import Positions
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initial_value, initialise, role_of, roles
from stablelm.model.linear import make_dtypes
from stablelm.model.norms import Norm
from stablelm.model.sublayer import Sublayer

SIZES = ("model.d_model=32", "model.n_heads=4", "data.seq_len=24", "train.steps=5")
MAGNETO_GAIN = {12: 1.782710, 24: 1.967537, 48: 2.136434}


def _config(method: str, *overrides: str) -> ModelConfig:
    """The resolved model section; overrides as on a command line."""
    config = load([], [f"model.method={method}", *SIZES, *overrides]).config
    return resolve(config, pieces=500, world_size=1, accelerate_precision=None).model


def _value(config: ModelConfig, kind: str, shape: tuple[int, ...] = (64, 96)) -> Tensor:
    sublayer = "feedforward" if kind.startswith("fc") else "attention"
    name = f"layers.1.{sublayer}.body.{kind}.weight"
    return initial_value(name, role_of(name), shape, config, 0)


def _gain(config: ModelConfig, kind: str) -> float:
    """How much larger than Glorot's draw with the same seed."""
    draw = _value(replace(config, init="fan_in"), kind) * math.sqrt(96) * math.sqrt(2 / (64 + 96))
    return (_value(config, kind) / draw).mean().item()


@pytest.mark.parametrize("n_layers", MAGNETO_GAIN)
@pytest.mark.parametrize("kind", ["value", "output", "fc1", "fc2", "query", "key"])
def test_magneto_multiplies_all_but_queries_and_keys(n_layers, kind):
    config = _config("magneto", f"model.n_layers={n_layers}")
    wanted = MAGNETO_GAIN[n_layers] if kind not in ("query", "key") else 1
    assert math.sqrt(math.log(2 * n_layers)) == pytest.approx(MAGNETO_GAIN[n_layers], abs=1e-6)
    assert _gain(config, kind) == pytest.approx(wanted, rel=1e-6)


def test_magneto_leaves_embeddings_head_and_biases_alone():
    shallow, deep = (_config("magneto", f"model.n_layers={n}", "model.bias=true") for n in (2, 6))
    first, second = Decoder(shallow, "fp32"), Decoder(deep, "fp32")
    initialise(first, shallow, 0)
    initialise(second, deep, 0)
    for name, role in roles(first).items():
        same = torch.equal(first.get_parameter(name), second.get_parameter(name))
        assert same == (role.kind not in ("value", "output", "fc1", "fc2")) or name == "norm_final.weight", name
        if role.kind == "bias":
            assert not first.get_parameter(name).any()


def test_magneto_stds_of_a_known_shape():
    config = _config("magneto", "model.n_layers=12", "model.d_model=768", "model.n_heads=12")
    square = {kind: _value(config, kind, (768, 768)).std().item() for kind in ("query", "key", "value", "output")}
    assert square == pytest.approx({"query": 0.0361, "key": 0.0361, "value": 0.0643, "output": 0.0643}, rel=0.01)
    wide = [_value(config, kind, shape).std().item() for kind, shape in (("fc1", (3072, 768)), ("fc2", (768, 3072)))]
    assert wide == pytest.approx([0.0407, 0.0407], rel=0.01)


@pytest.mark.parametrize("bias", [False, True])
def test_magneto_has_four_norms_a_layer_and_one_at_the_end(bias):
    sizes = ("model.n_layers=3", f"model.bias={bias}", "model.d_ff=80", "model.kv_heads=2")
    config, pre = _config("magneto", *sizes), _config("pre_ln", *sizes)
    with torch.device("meta"):
        decoder = Decoder(config, "fp32")
    gains = {name: module.weight for name, module in decoder.named_modules() if isinstance(module, Norm)}
    norms = {name: gain.numel() for name, gain in gains.items() if gain is not None}
    assert norms.pop("norm_final") == 32
    assert len(norms) == 4 * 3
    for layer in range(3):
        assert norms[f"layers.{layer}.attention.norm_in"] == norms[f"layers.{layer}.feedforward.norm_in"] == 32
        assert norms[f"layers.{layer}.attention.body.norm_inner"] == 32  # all query heads together
        assert norms[f"layers.{layer}.feedforward.body.norm_inner"] == 80
    more = parameter_counts(config)["total"] - parameter_counts(pre)["total"]
    assert more == 3 * (1 + bias) * (32 + 80)


def _initialised(config: ModelConfig, seed: int = 0) -> Decoder:
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, seed)
    return decoder


def _tokens(config: ModelConfig, batch: int = 2, seq_len: int = 24, seed: int = 0) -> Tensor:
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


def test_magneto_output_matrices_read_normalised_tokens():
    decoder = _initialised(_config("magneto", "model.n_layers=2"))
    seen = []
    for name, matrix in decoder.layers.named_modules():
        if name.endswith((".output", ".fc2")):
            matrix.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    decoder(_tokens(decoder.config))
    assert len(seen) == 4
    for x in seen:
        assert x.mean(dim=-1).abs().max() < 1e-5
        torch.testing.assert_close(x.var(dim=-1, unbiased=False), torch.ones(x.shape[:-1]), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("matrix", "activation", "changes"),
    [
        ("attention.body.value", "gelu", False),
        ("feedforward.body.fc1", "relu", False),
        ("feedforward.body.fc1", "gelu", True),
    ],
)
def test_magneto_output_does_not_see_the_size_of_what_its_inner_norm_undoes(matrix, activation, changes):
    decoder = _initialised(_config("magneto", "model.n_layers=2", f"model.activation={activation}"))
    tokens = _tokens(decoder.config)
    before = decoder(tokens)
    with torch.no_grad():
        for layer in range(2):
            decoder.get_parameter(f"layers.{layer}.{matrix}.weight").mul_(3)
    difference = ((decoder(tokens) - before).norm() / before.norm()).item()
    assert difference > 0.01 if changes else difference < 1e-4


def _stream_variance(config: ModelConfig, seed: int) -> float:
    decoder, last = _initialised(config, seed), []
    decoder.tap = lambda _, chunks: (last.append(chunks[0].square().mean().item()), chunks)[1]
    with torch.no_grad():
        decoder(_tokens(config, seq_len=128, seed=seed))
    return last[-1] / last[0]


@pytest.mark.parametrize(("n_layers", "wanted"), [(4, 22.6), (12, 100.2), (24, 242.6)])
def test_magneto_variance_of_the_stream_at_the_start(n_layers, wanted):
    """1 + 2.6 M ln 2M with Glorot's stds and d_ff = 4 d: an attention branch has variance g^2, the other 1.6 g^2."""
    sizes = (f"model.n_layers={n_layers}", "model.d_model=256", "data.seq_len=128", "model.activation=relu")
    assert 1 + 2.6 * n_layers * math.log(2 * n_layers) == pytest.approx(wanted, abs=0.05)
    assert _stream_variance(_config("magneto", *sizes), 0) == pytest.approx(wanted, rel=0.1)


# Sub-layers against the equations.


def _sublayer(config: ModelConfig, index: int, precision: str) -> Sublayer:
    sublayer = Sublayer(config, make_dtypes(precision, "fp32"), index)
    generator = torch.Generator().manual_seed(index)
    with torch.no_grad():
        for name, parameter in sublayer.named_parameters():
            size = 1.0 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + size * 0.8 * torch.randn(parameter.shape, generator=generator))
    return sublayer


def _layernorm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)


def _affine(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def _turned(x: Tensor) -> Tensor:
    """Rotary positions: features i and i + half as a complex number, turned by position / 10000^(i / half)."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(len(x)).double(), 10000.0 ** -(torch.arange(half).double() / half))
    turned = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def _plain_attention(x: Tensor, w: dict[str, Tensor], config: ModelConfig, inner_norm: bool) -> Tensor:
    """x: (batch, seq, d) -> W_o LN(heads), a loop over sequences and heads."""
    width, rows = d_head(config), []
    groups = config.n_heads // (config.kv_heads or config.n_heads)
    for sequence in x:
        q, k, v = (_affine(sequence, w, f"body.{kind}") for kind in ("query", "key", "value"))
        heads = []
        for head in range(config.n_heads):
            own, shared = (slice(i * width, (i + 1) * width) for i in (head, head // groups))
            logits = _turned(q[:, own]) @ _turned(k[:, shared]).T / width**0.5
            causal = torch.ones_like(logits).tril() > 0
            weights = torch.where(causal, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, shared])
        rows.append(torch.cat(heads, dim=-1))
    mixed = torch.stack(rows)
    return _affine(_layernorm(mixed, w, "body.norm_inner") if inner_norm else mixed, w, "body.output")


def _plain_feedforward(x: Tensor, w: dict[str, Tensor], config: ModelConfig, inner_norm: bool) -> Tensor:
    hidden = _affine(x, w, "body.fc1")
    hidden = hidden.clamp(min=0) if config.activation == "relu" else hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return _affine(_layernorm(hidden, w, "body.norm_inner") if inner_norm else hidden, w, "body.fc2")


def _plain_magneto(x: Tensor, w: dict[str, Tensor], config: ModelConfig, index: int) -> Tensor:
    """x + W_o LN(Attn(LN x)), x + W_2 LN(act(W_1 LN x)): Wang et al. 2023, eqs. 1-5 and 11."""
    body = _plain_feedforward if index % 2 else _plain_attention
    return x + body(_layernorm(x, w, "norm_in"), w, config, True)


def _plain_deepnorm(x: Tensor, w: dict[str, Tensor], config: ModelConfig, index: int) -> Tensor:
    """LN((2 N)^(1/4) x + f(x)): Wang et al. 2022, section 3."""
    body = _plain_feedforward if index % 2 else _plain_attention
    return _layernorm((2 * config.n_layers) ** 0.25 * x + body(x, w, config, False), w, "norm_out")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-6)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("index", "activation", "kv_heads"), [(0, "gelu", 4), (2, "gelu", 2), (1, "relu", 4), (3, "gelu", 4)]
)
@pytest.mark.parametrize(("method", "plain"), [("magneto", _plain_magneto), ("deepnorm", _plain_deepnorm)])
def test_sublayers_equal_the_equations(method, plain, index, activation, kv_heads, bias, precision, tolerance):
    options = (f"model.activation={activation}", f"model.kv_heads={kv_heads}", f"model.bias={bias}")
    config = _config(method, "model.n_layers=8", *options)
    sublayer = _sublayer(config, index, precision)
    generator = torch.Generator().manual_seed(9)
    x, back = (torch.randn(2, 11, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    dtype = next(sublayer.parameters()).dtype
    ours, theirs = (x.to(dtype).requires_grad_() for _ in range(2))
    positions = Positions(rotation_table(11, 8, 10000.0, dtype=dtype, device=torch.device("cpu")))
    weights = {name: p.detach().clone().requires_grad_() for name, p in sublayer.named_parameters()}
    (found,) = sublayer.leave((ours,), sublayer.enter((ours,))[1], positions)
    wanted = plain(theirs, weights, config, index)
    found.backward(back.to(dtype))
    wanted.backward(back.to(dtype))
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    pairs = {"x": (ours.grad, theirs.grad)}
    pairs |= {name: (parameter.grad, weights[name].grad) for name, parameter in sublayer.named_parameters()}
    assert len(pairs) == len(weights) + 1
    # What keys' biases get is a small difference of large terms: rounding shows against the largest gradient.
    floor = 0.1 * max(gradient.norm() for _, gradient in pairs.values() if gradient is not None)
    for name, (mine, theirs_too) in pairs.items():
        assert mine is not None and theirs_too is not None, name
        assert (mine - theirs_too).norm() <= tolerance * max(theirs_too.norm(), floor), name


# DeepNorm.


@pytest.mark.parametrize(
    ("n_layers", "alpha", "beta"), [(12, 2.213364, 0.319472), (48, 3.1302, 0.2259), (1000, 6.687, 0.1057)]
)
def test_deepnorm_constants(n_layers, alpha, beta):
    config = _config("deepnorm", f"model.n_layers={n_layers}")
    assert config.axes.stream.gains(config) == pytest.approx((alpha, 1.0), rel=1e-4)
    assert config.axes.stream.gains(config)[0] == pytest.approx((2 * n_layers) ** 0.25, rel=1e-12)
    for kind in ("value", "output", "fc1", "fc2"):
        assert _gain(config, kind) == pytest.approx((8 * n_layers) ** -0.25, rel=1e-6)
        assert _gain(config, kind) == pytest.approx(beta, rel=1e-3)
    assert _gain(config, "query") == _gain(config, "key") == pytest.approx(1, rel=1e-6)


def test_deepnorm_normalises_after_every_layer():
    decoder, variances = _initialised(_config("deepnorm", "model.n_layers=6")), []
    decoder.tap = lambda _, chunks: (variances.append(chunks[0].var(dim=-1, unbiased=False)), chunks)[1]
    decoder(_tokens(decoder.config))
    assert len(variances) == 7
    for variance in variances[1:]:
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-3)


def test_deepnorm_and_sub_norms_exclude_each_other():
    with pytest.raises(ConfigError, match=r"model\.stream=deepnorm with model\.placement=sub"):
        _config("magneto", "model.stream=deepnorm")


def _depth_profile(config: ModelConfig) -> tuple[float, float]:
    """(correlation of two tokens after the last layer, largest / smallest gradient norm of a layer's matrices)."""
    decoder, last = _initialised(config), []
    decoder.tap = lambda _, chunks: (last.append(chunks[0].detach()), chunks)[1]
    tokens = _tokens(config, seq_len=65)
    decoder(tokens[:, :-1], tokens[:, 1:]).total.backward()
    products = last[-1] @ last[-1].transpose(1, 2)
    own = products.diagonal(dim1=1, dim2=2)
    correlation = (products.sum() - own.sum()) / (64 - 1) / own.sum()
    squares = [0.0] * config.n_layers
    for name, role in roles(decoder).items():
        gradient = decoder.get_parameter(name).grad
        if role.layer is not None and gradient is not None and gradient.ndim == 2:
            squares[role.layer] += gradient.square().sum().item()
    return correlation.item(), math.sqrt(max(squares) / min(squares))


def test_deepnorm_keeps_tokens_apart_and_gradients_even():
    sizes = ("model.n_layers=48", "model.d_model=64", "data.seq_len=64", "model.activation=relu")
    correlation, spread = _depth_profile(_config("deepnorm", *sizes))
    assert correlation < 0.02
    assert spread < 1.1
    for method in ("pre_ln", "post_ln"):  # what it mends
        correlation, spread = _depth_profile(_config(method, *sizes))
        assert correlation > 0.8
        assert spread > 3
