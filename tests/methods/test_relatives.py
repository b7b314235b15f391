"""Methods next to the main ones: logits, z-loss, low rank, value residuals, and streams that start as plain ones."""

import math
from dataclasses import replace

import pytest
import torch
from support.bodies import first_products
from support.parity import assert_parity
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.errors import ConfigError
from stablelm.methods.alibi import alibi_bias, alibi_slopes
from stablelm.methods.dyt import slope_by_width
from stablelm.methods.positions import rotation_table
from stablelm.methods.sizes import parameter_counts
from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.linear import LowRankLinear
from stablelm.model.loss import chunked_cross_entropy

SIZES = ("model.n_layers=3", "model.d_model=32", "model.n_heads=4", "data.seq_len=24", "train.steps=5")
CPU = torch.device("cpu")
# What DenseFormer's default differs from GPT-2's in, but for the sums.
GPT2_AS_DENSE = ("model.n_layers=6", "model.bias=false", "model.tie_embeddings=false", "model.attention.position=rope")


def _config(method: str, *overrides: str) -> ModelConfig:
    config = load([], [f"model.method={method}", *SIZES, *overrides]).config
    return resolve(config, pieces=200, world_size=1, accelerate_precision=None).model


def _decoder(config: ModelConfig, precision: str = "fp64", seed: int = 0) -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, seed)
    return decoder


def _attention(decoder: Decoder, layer: int = 0) -> Attention:
    attention = decoder.get_submodule(f"layers.{layer}.attention.body")
    assert isinstance(attention, Attention)
    return attention


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens() -> Tensor:
    return torch.randint(200, (2, 24), generator=torch.Generator().manual_seed(0))


def _visible_logits(attention: Attention, x: Tensor, gain: float = 1.0) -> Tensor:
    """All logits of keys up to the query, of queries whose map is `gain` times as large."""
    seq_len = x.shape[1]
    positions = Positions(rotation_table(seq_len, attention.d_head, 10000.0, dtype=x.dtype, device=CPU))
    products = first_products(attention, x, gain)
    logits = attention.logits(*attention.queries_and_keys(products, positions), positions)
    return logits[..., torch.ones(seq_len, seq_len).tril() > 0]


# Logits.


def test_normalised_queries_and_keys_bound_the_logits_and_forget_their_size():
    attention = _attention(_decoder(_config("qk_norm"), "fp32"))
    x = (3 * _draw(2, 24, 32)).float()
    logits = _visible_logits(attention, x)
    assert logits.abs().max() <= math.sqrt(8) + 1e-3
    assert logits.abs().max() > 0.8 * math.sqrt(8)
    torch.testing.assert_close(_visible_logits(attention, x, gain=100), logits, rtol=1e-3, atol=1e-3)
    plain = _attention(_decoder(_config("pre_ln"), "fp32"))
    assert _visible_logits(plain, x, gain=100).abs().max() > 10 * math.sqrt(8)


def test_normalised_queries_equal_the_equation():
    """RMSNorm over each head before the rotation, with gains that the heads share."""
    decoder = _decoder(_config("qk_norm", "model.attention.position=none"))
    attention = _attention(decoder)
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * _draw(*parameter.shape))
    w = dict(attention.named_parameters())
    x = _draw(2, 24, 32)
    q, k, _ = (linear(x) for linear in attention.first_maps)
    found = attention.logits(*attention.queries_and_keys((torch.cat((q, k), dim=-1), k), Positions()), Positions())
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        q_head, k_head = (
            y[..., part] / (y[..., part].square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"norm_{name}.weight"]
            for y, name in ((q, "query"), (k, "key"))
        )
        wanted = (q_head @ k_head.transpose(1, 2) / math.sqrt(8)).masked_fill(torch.ones(24, 24).triu(1) > 0, -math.inf)
        torch.testing.assert_close(found[:, head], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("logit", "capped"), [(50.0, 38.0797), (200.0, 49.9665), (30.0, 26.8525), (-200.0, -49.9665)])
def test_soft_cap_at_known_logits(logit, capped):
    attention = _attention(_decoder(_config("pre_ln", "model.attention.logit_cap=50", "model.attention.position=none")))
    query = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    key = query.clone()
    query[..., 0], key[..., 0] = logit, math.sqrt(8)
    assert attention.logits(query, key, Positions()).flatten().tolist() == pytest.approx([capped] * 4, abs=1e-3)


def test_soft_cap_bounds_and_a_high_one_changes_nothing():
    x = 3 * _draw(2, 24, 32)
    capped, high, plain = (
        _attention(_decoder(_config("pre_ln", f"model.attention.logit_cap={cap}"))) for cap in (5, 1e6, 0)
    )
    assert _visible_logits(plain, x).abs().max() > 5 > _visible_logits(capped, x).abs().max()
    tokens = _tokens()
    high_out, plain_out = (
        _decoder(_config("pre_ln", f"model.attention.logit_cap={cap}", "model.kv_heads=2"))(tokens) for cap in (1e6, 0)
    )
    torch.testing.assert_close(high_out, plain_out, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(_visible_logits(high, x), _visible_logits(plain, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("options", [(), ("model.attention.qk_norm=true",), ("model.kv_heads=2",)])
def test_the_logits_that_are_told_are_those_that_weigh_the_values(position, options):
    decoder = _decoder(_config("pre_ln", f"model.attention.position={position}", *options))
    attention, x = _attention(decoder), _draw(2, 24, 32)
    positions = decoder.positions(_tokens())
    products = first_products(attention, x)
    weights = attention.logits(*attention.queries_and_keys(products, positions), positions).softmax(dim=-1)
    value = products[1].unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(4 * 8 // products[1].shape[-1], dim=1)
    assert attention.output is not None
    wanted = (weights @ value).transpose(1, 2).flatten(-2) @ attention.output.weight.T
    torch.testing.assert_close(attention(products, positions), wanted, rtol=1e-10, atol=1e-12)


def test_alibi_slopes_and_biases():
    assert alibi_slopes(8) == pytest.approx([2.0**-i for i in range(1, 9)], rel=1e-12)
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert alibi_slopes(12) == pytest.approx(twelve, rel=1e-12)
    bias = alibi_bias(4, 8, dtype=torch.float64, device=CPU)
    assert bias[1, 3].tolist() == pytest.approx([-0.75, -0.5, -0.25, 0])
    assert torch.isneginf(bias[:, torch.ones(4, 4).triu(1) > 0]).all()


def test_z_loss_of_uniform_logits():
    hidden, weight = torch.zeros(6, 4, requires_grad=True), _draw(8192, 4).float()
    targets = torch.tensor([1, 5, -100, 7, -100, 0])
    sums = chunked_cross_entropy(hidden, weight, targets, z_loss=1e-4)
    extra = (sums.total - sums.cross_entropy).item() / 4  # ignored tokens add nothing
    assert math.log(8192) == pytest.approx(9.010913, abs=1e-6)
    assert extra == pytest.approx(0.0081197, abs=1e-6)


def test_z_loss_gradient_is_twice_log_z_times_the_probabilities():
    logits = 3 * _draw(5, 40)
    targets = torch.tensor([3, 9, -100, 0, 39])
    gradients = []
    for z_loss in (0.0, 1e-2):  # a unit weight matrix: hidden states are logits
        hidden = logits.clone().requires_grad_()
        chunked_cross_entropy(hidden, torch.eye(40, dtype=torch.float64), targets, z_loss=z_loss).total.backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    wanted = 2e-2 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) * (targets >= 0)[:, None]
    torch.testing.assert_close(gradients[1] - gradients[0], wanted, rtol=1e-9, atol=1e-12)


# Low rank.


def test_low_rank_maps_have_that_rank_and_at_a_half_the_parameters_of_whole_ones():
    config, whole = (_config("mlra", "model.d_model=64", f"model.attention.low_rank={share}") for share in (0.5, 0))
    decoder = _decoder(config)
    for linear in _attention(decoder).first_maps:
        assert isinstance(linear, LowRankLinear)
        assert (linear.down.weight.shape, linear.up.weight.shape) == ((32, 64), (64, 32))
        product = linear.up.weight @ linear.down.weight
        assert torch.linalg.matrix_rank(product).item() == 32
        x = _draw(3, 64)
        torch.testing.assert_close(linear(x), x @ product.T, rtol=1e-12, atol=1e-12)
    assert parameter_counts(config) == parameter_counts(whole)
    assert (
        parameter_counts(_config("mlra", "model.d_model=64", "model.attention.low_rank=0.25"))["layers"]
        < (parameter_counts(whole)["layers"])
    )


def test_factors_give_their_product_the_std_of_a_whole_map():
    """Two factors of 0.02 would make 0.00784 at rank 384: each has (0.02^2 / 384)^(1/4)."""
    config = replace(_config("mlra", "model.n_layers=1", "model.n_heads=8"), d_model=768, d_ff=8)
    decoder = _decoder(config, "fp32")
    for linear in _attention(decoder).first_maps:
        assert isinstance(linear, LowRankLinear)
        each = [factor.weight.std().item() for factor in (linear.down, linear.up)]
        assert each == pytest.approx([(0.02**2 / 384) ** 0.25] * 2, rel=0.01)
        assert (linear.up.weight @ linear.down.weight).std().item() == pytest.approx(0.02, rel=0.02)
    assert 0.02**2 * math.sqrt(384) == pytest.approx(0.00784, rel=1e-3)


# Value residuals.


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_later_layers_average_their_values_with_the_first_ones(kv_heads):
    config = _config("value_residual", f"model.kv_heads={kv_heads}")
    decoder, plain = _decoder(config), _decoder(_config("pre_ln", f"model.kv_heads={kv_heads}"))
    tokens = _tokens()
    positions, x = plain.positions(tokens), plain.embed(tokens)
    first = None
    for layer in plain.layers:
        attention, feedforward = layer.get_submodule("attention"), layer.get_submodule("feedforward")
        both, value = attention.enter((x,))[1]  # type: ignore[operator]
        first = value if first is None else first
        mixed = value if value is first else (value + first) / 2
        (x,) = attention.leave((x,), (both, mixed), positions)  # type: ignore[operator]
        (x,) = feedforward.leave((x,), feedforward.enter((x,))[1], positions)  # type: ignore[operator]
    torch.testing.assert_close(decoder(tokens), plain.finish((x,)), rtol=1e-12, atol=1e-12)
    assert (decoder(tokens) - plain(tokens)).abs().max() > 1e-3
    assert len(list(decoder.parameters())) == len(list(plain.parameters()))


def test_learned_weights_of_values_start_at_halves_and_equal_the_equation():
    """V_l <- lambda_l1 V_1 + lambda_l2 V_l: logits and gradients of a plain loop over layers of a plain model."""
    learned = "model.value_residual.learned=true"
    decoder, fixed = _decoder(_config("value_residual", learned)), _decoder(_config("value_residual"))
    tokens = _tokens()
    torch.testing.assert_close(decoder(tokens), fixed(tokens), rtol=1e-12, atol=1e-12)
    own = {name: each for name, each in decoder.named_parameters() if name.endswith("value_weights")}
    assert list(own) == [f"layers.{layer}.attention.body.value_weights" for layer in (1, 2)]
    assert parameter_counts(decoder.config)["total"] == sum(each.numel() for each in decoder.parameters())
    weights = [torch.tensor([0.8, -0.3]).double(), torch.tensor([0.2, 1.1]).double()]
    with torch.no_grad():
        for parameter, value in zip(own.values(), weights, strict=True):
            parameter.copy_(value)
    plain = _decoder(_config("pre_ln"))
    moved = [value.clone().requires_grad_() for value in weights]
    out, same = decoder(tokens), _with_mixed_values(plain, tokens, moved)
    torch.testing.assert_close(out, same, rtol=1e-12, atol=1e-12)
    out.square().mean().backward()
    same.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in decoder.named_parameters():
        gradient = dict(zip(own, moved, strict=True))[name].grad if name in own else theirs[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


def _with_mixed_values(plain: Decoder, tokens: Tensor, weights: list[Tensor]) -> Tensor:
    """The hidden states of a plain model whose layers from the second on mix values by these weights."""
    positions, x, first = plain.positions(tokens), plain.embed(tokens), None
    for index, layer in enumerate(plain.layers):
        attention, feedforward = layer.get_submodule("attention"), layer.get_submodule("feedforward")
        both, value = attention.enter((x,))[1]  # type: ignore[operator]
        first = value if first is None else first
        mixed = value if index == 0 else weights[index - 1][0] * first + weights[index - 1][1] * value
        (x,) = attention.leave((x,), (both, mixed), positions)  # type: ignore[operator]
        (x,) = feedforward.leave((x,), feedforward.enter((x,))[1], positions)  # type: ignore[operator]
    return plain.finish((x,))


# Streams that start as simpler ones.


def test_rezero_starts_as_the_identity_and_its_gains_open_it():
    decoder = _decoder(_config("rezero"))
    tokens = _tokens()
    torch.testing.assert_close(decoder(tokens), decoder.embed(tokens), rtol=0, atol=1e-6)
    decoder(tokens).square().sum().backward()
    gains = {name: p for name, p in decoder.named_parameters() if name.endswith(".gain")}
    assert len(gains) == 2 * 3
    for name, parameter in decoder.named_parameters():
        if name.startswith("layers."):
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (name in gains), name
    with torch.no_grad():
        gains["layers.0.attention.gain"].fill_(0.5)
    layer = decoder.layers[0].get_submodule("attention")
    x = decoder.embed(tokens)
    products = layer.enter((x,))[1]  # type: ignore[operator]
    wanted = x + 0.5 * layer.get_submodule("body")(products, decoder.positions(tokens))
    torch.testing.assert_close(decoder(tokens), wanted, rtol=1e-12, atol=1e-12)


def test_denseformer_starts_as_pre_ln():
    config, plain_config = _config("denseformer"), _config("pre_ln", "model.init=gpt2")
    decoder, plain = _decoder(config), _decoder(plain_config)
    torch.testing.assert_close(decoder(_tokens()), plain(_tokens()), rtol=0, atol=1e-6)
    extra = parameter_counts(config)["total"] - parameter_counts(plain_config)["total"]
    assert extra == 3 * (3 + 3) / 2


def test_denseformer_averages_all_outputs_so_far():
    """x_i = sum_j a_ij y_j over the embedding y_0 and the outputs y_j of layer j (Pagliardini et al. 2024)."""
    decoder = _decoder(_config("denseformer"))
    weights = [0.2 * _draw(count, seed=count) + torch.eye(count)[-1] for count in (2, 3, 4)]
    with torch.no_grad():
        for index, weight in enumerate(weights):
            decoder.get_parameter(f"layers.{index}.mix").copy_(weight)
    plain = _decoder(_config("pre_ln", "model.init=gpt2"))
    tokens = _tokens()
    positions, x = plain.positions(tokens), plain.embed(tokens)
    outputs = [x]
    for layer, weight in zip(plain.layers, weights, strict=True):
        outputs.append(layer((x,), positions)[0])
        x = (torch.stack(outputs) * weight[:, None, None, None]).sum(dim=0)
    torch.testing.assert_close(decoder(tokens), plain.finish((x,)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 5), (3, 2)])
def test_denseformer_with_dilation_and_period_equals_the_equation(dilation, period):
    """y_i = sum of a_ij x_j over j = i mod k, for i that p divides: hidden states and gradients of a plain loop."""
    options = (f"model.denseformer.dilation={dilation}", f"model.denseformer.period={period}", "model.n_layers=6")
    decoder, plain = _decoder(_config("denseformer", *options)), _decoder(_config("gpt2", *GPT2_AS_DENSE))
    tokens = _tokens()
    torch.testing.assert_close(decoder(tokens), plain(tokens), rtol=1e-12, atol=1e-12)
    assert parameter_counts(decoder.config)["total"] == sum(each.numel() for each in decoder.parameters())
    own = {name: each for name, each in decoder.named_parameters() if name.endswith(".mix")}
    assert list(own) == [f"layers.{i - 1}.mix" for i in range(1, 7) if i % period == 0]
    with torch.no_grad():
        for number, parameter in enumerate(own.values()):
            parameter.copy_(0.3 * _draw(*parameter.shape, seed=number) + torch.eye(len(parameter))[-1])
    moved = {name: each.detach().clone().requires_grad_() for name, each in own.items()}
    positions, y = plain.positions(tokens), plain.embed(tokens)
    outputs = [y]
    for i, layer in enumerate(plain.layers, 1):
        outputs.append(layer((y,), positions)[0])
        weights = moved.get(f"layers.{i - 1}.mix")
        read = [j for j in range(i + 1) if (i - j) % dilation == 0]
        y = outputs[-1]
        if weights is not None:
            y = torch.stack([weight * outputs[j] for weight, j in zip(weights, read, strict=True)]).sum(dim=0)
    same = plain.finish((y,))
    torch.testing.assert_close(decoder(tokens), same, rtol=1e-12, atol=1e-12)
    decoder(tokens).square().mean().backward()
    same.square().mean().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in decoder.named_parameters():
        gradient = moved[name].grad if name in moved else theirs[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-13, msg=name)


def test_denseformer_refuses_a_period_without_a_sum():
    with pytest.raises(ConfigError, match=r"model\.denseformer\.period=4 with model\.n_layers=3: .*; use a period of"):
        _config("denseformer", "model.denseformer.period=4")


# DyT and one std for all.


def test_dyt_starts_its_slopes_by_place_and_width():
    decoder = _decoder(_config("dyt", "model.dyt.attention_alpha=0.7", "model.dyt.other_alpha=0.3"))
    slopes = {name: each.item() for name, each in decoder.named_parameters() if name.endswith("alpha")}
    assert len(slopes) == 2 * 3 + 1
    for name, slope in slopes.items():
        assert slope == pytest.approx(0.7 if ".attention." in name else 0.3), name
    assert decoder.get_parameter("scaling.embedding_gain").item() == pytest.approx(math.sqrt(32))
    for width, attention, other in (
        (64, 1, 1),
        (2048, 1, 0.5),
        (5120, 0.6, 0.15),
        (8192, 0.2, 0.05),
        (16384, 0.2, 0.05),
    ):
        assert slope_by_width(width, attention=True) == pytest.approx(attention)
        assert slope_by_width(width, attention=False) == pytest.approx(other)
    assert 0.2 < slope_by_width(3000, attention=False) < 0.5


def test_dyt_equals_the_equation(record_property):
    """tanh(alpha x) gamma + beta before sub-layers and the head, after g E: hidden states and gradients."""
    decoder = _decoder(_config("dyt", "model.bias=true", "model.attention.position=none"))
    with torch.no_grad():
        for number, parameter in enumerate(decoder.parameters()):
            if parameter.ndim == 1:
                parameter.add_(0.1 * _draw(*parameter.shape, seed=number))
    weights = {name: each.detach().clone().requires_grad_() for name, each in decoder.named_parameters()}
    tokens = _tokens()
    out, same = decoder(tokens), _plain_dyt(weights, tokens)
    out.square().mean().backward()
    same.square().mean().backward()
    named = [(name, parameter) for name, parameter in decoder.named_parameters() if name != "head.weight"]
    gradients = {name: (parameter.grad, weights[name].grad) for name, parameter in named}
    idle = tuple(name for name in gradients if name.endswith("key.bias"))  # the softmax does not see it
    assert_parity(record_property, "dyt", (out, same), gradients, idle=idle)


def _plain_dyt(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Three layers of width 32 with four heads, without positions, in plain torch."""

    def dyt(x: Tensor, stem: str) -> Tensor:
        return w[f"{stem}.weight"] * torch.tanh(w[f"{stem}.alpha"] * x) + w[f"{stem}.bias"]

    def linear(x: Tensor, stem: str) -> Tensor:
        return x @ w[f"{stem}.weight"].T + w[f"{stem}.bias"]

    x = w["scaling.embedding_gain"] * w["embedding.weight"][tokens]
    mask = torch.ones(24, 24, dtype=torch.bool).triu(1)
    for layer in range(3):
        stem = f"layers.{layer}.attention"
        h = dyt(x, f"{stem}.norm_in")
        q, k, v = (linear(h, f"{stem}.body.{name}").unflatten(-1, (4, 8)) for name in ("query", "key", "value"))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
        mixed = torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(mask, -math.inf).softmax(-1), v).flatten(-2)
        x = x + linear(mixed, f"{stem}.body.output")
        stem = f"layers.{layer}.feedforward"
        hidden = linear(dyt(x, f"{stem}.norm_in"), f"{stem}.body.fc1")
        x = x + linear(torch.nn.functional.gelu(hidden), f"{stem}.body.fc2")
    return dyt(x, "norm_final")


@pytest.mark.parametrize("init", ["xavier", "unit", "magneto", "deepscale"])
def test_dyt_gives_the_stream_unit_variance_under_any_init(init):
    decoder = _decoder(_config("dyt", f"model.init={init}", "model.d_model=128"))
    assert decoder.embed(_tokens()).square().mean().item() == pytest.approx(1, abs=0.1)


def test_without_norms_sigma_reparametrised_matrices_have_one_std_at_any_depth():
    """0.02 for every linear map, as in the released vision code, output projections too."""
    decoder = _decoder(_config("sigma_reparam_nonorm", "model.d_model=128"))
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name


def test_layernorm_scaling_divides_each_norm_by_the_root_of_its_layer():
    decoder = _decoder(_config("layernorm_scaling"))
    x = _draw(2, 5, 32)
    for layer in range(3):
        for sublayer in ("attention", "feedforward"):
            y = decoder.get_submodule(f"layers.{layer}.{sublayer}.norm_in")(x)
            rms = y.square().mean(-1).sqrt()
            torch.testing.assert_close(rms, torch.full_like(rms, (layer + 1) ** -0.5), rtol=1e-4, atol=0)
    final = decoder.get_submodule("norm_final")(x).square().mean(-1)
    torch.testing.assert_close(final, torch.ones_like(final), rtol=1e-4, atol=0)


def test_peri_ln_writes_normalised_branches():
    decoder, branches = _decoder(_config("peri_ln")), []
    for name, part in decoder.named_modules():
        if name.endswith(".dropout"):
            part.register_forward_hook(lambda _, args, out: branches.append(out))
    decoder(_tokens())
    assert len(branches) == 6
    for branch in branches:
        torch.testing.assert_close(branch.square().mean(-1), torch.ones_like(branch[..., 0]), rtol=1e-2, atol=0)
    embedded = decoder.embed(_tokens())
    torch.testing.assert_close(embedded.square().mean(-1), torch.ones_like(embedded[..., 0]), rtol=1e-3, atol=0)


def test_t_fixup_constants():
    config = _config("tfixup", "model.n_layers=48")
    decoder = _decoder(config, "fp32")
    assert config.axes.init.embedding_std(config) * math.sqrt(32) == pytest.approx(0.2193, abs=1e-4)
    for kind, glorot in (("attention.body.value", 1 / 32), ("feedforward.body.fc2", 2 / (32 + 128))):
        values = torch.stack([decoder.get_parameter(f"layers.{layer}.{kind}.weight") for layer in range(48)])
        assert values.std().item() / math.sqrt(glorot) == pytest.approx(0.2545, rel=0.02)
    query = torch.stack([decoder.get_parameter(f"layers.{layer}.attention.body.query.weight") for layer in range(48)])
    assert query.std().item() * math.sqrt(32) == pytest.approx(1, rel=0.02)
