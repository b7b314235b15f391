"""Initial values: stds by role, independence, and what they do to the signal."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Role
from stablelm.methods.catalogue import apply_method
from stablelm.methods.catformer import CatformerOptions
from stablelm.methods.sigma_reparam import SigmaOptions
from stablelm.methods.stds import initial_std
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import decays, initial_value, initialise, role_of, roles
from stablelm.model.linear import Linear
from stablelm.model.sublayer import Layer

SIZES: dict[str, Any] = {
    "n_layers": 2,
    "d_model": 128,
    "n_heads": 4,
    "kv_heads": 2,
    "d_ff": 384,
    "max_seq_len": 64,
    "vocab_size": 512,
}
_HEADS = ("query", "key", "value")
CATFORMER = CatformerOptions(growth=16, d_attention=64)


def _config(method: str, **keys) -> ModelConfig:
    return apply_method(ModelConfig(method=method, **(SIZES | keys)))


def _stds(init: str, n_layers: int) -> dict[str, float]:
    """The stds of the papers for SIZES (d 128, d_head 32, d_kv 64, d_ff 384), written out."""
    small = 0.02 / math.sqrt(2 * n_layers)
    if init == "gpt2":
        return _table(0.02, (0.02,) * 3, 0.02, 0.02) | {"output": small, "fc2": small}
    if init == "completep":  # base width 256
        hidden = 0.02 / math.sqrt(128 / 256)
        return _table(0.02, (hidden,) * 3, hidden, hidden) | {"head": 0.02}
    if init == "fan_in":  # two tables of half the variance
        head = 1 / math.sqrt(128)
        return _table(math.sqrt(1 / 2), (head,) * 3, head, head) | {"head": head, "fc2": 1 / math.sqrt(384)}
    glorot = (1 / math.sqrt(128), math.sqrt(2 / 192), math.sqrt(2 / 192))
    sized = {"magneto": math.log(2 * n_layers) ** 0.5, "deepnet": (8 * n_layers) ** -0.25}
    sized |= {"tfixup": 0.67 * n_layers**-0.25, "xavier": 1.0}
    stds = _table(1 / math.sqrt(128), glorot, 1 / math.sqrt(128), math.sqrt(2 / (128 + 384)))
    if init == "xavier":
        return stds | dict.fromkeys(("query", "key", "value"), math.sqrt(2 / (128 + 32)))
    if init == "tfixup":
        stds |= dict.fromkeys(("embedding", "position"), (9 * n_layers) ** -0.25 / math.sqrt(128))
    return stds | {kind: stds[kind] * sized[init] for kind in ("value", "output", "fc1", "gate", "fc2")}


def _table(tables: float, heads: tuple[float, ...], output: float, wide: float) -> dict[str, float]:
    stds = dict.fromkeys(("embedding", "position", "head"), tables)
    stds |= dict(zip(("query", "key", "value"), heads, strict=True))
    return stds | {"output": output} | dict.fromkeys(("fc1", "gate", "fc2"), wide)


@pytest.mark.parametrize("init", ["gpt2", "xavier", "magneto", "deepnet", "tfixup", "completep", "fan_in"])
@pytest.mark.parametrize("n_layers", [2, 8])
def test_every_parameter_has_the_std_of_its_role(init, n_layers):
    config = _config("gpt2", init=init, n_layers=n_layers, activation="swiglu", tie_embeddings=False)
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    stds, seen = _stds(init, n_layers), set()
    for name, role in roles(decoder).items():
        values = decoder.get_parameter(name)
        seen.add(role.kind)
        if role.kind in ("norm_gain", "bias"):
            assert (values == (1 if role.kind == "norm_gain" else 0)).all(), name
            continue
        assert values.std().item() == pytest.approx(stds[role.kind], rel=4 / math.sqrt(2 * values.numel())), name
        assert abs(values.mean().item()) < 4 * stds[role.kind] / math.sqrt(values.numel()), name
        assert initial_std(role, values.shape, config) == pytest.approx(stds[role.kind], rel=1e-12)
    assert seen == {*stds, "norm_gain", "bias"}


def test_roles_name_kind_and_layer():
    assert role_of("embedding.weight") == Role("embedding", None)
    assert role_of("layers.17.attention.body.query.weight") == Role("query", 17)
    assert role_of("layers.0._checkpoint_wrapped_module._orig_mod.feedforward.body.fc2.bias") == Role("bias", 0)
    assert role_of("layers.3.feedforward.norm_out.weight") == Role("norm_gain", 3)
    assert role_of("norm_final.bias") == Role("bias", None)
    assert role_of("layers.2.attention.norm_in.alpha") == Role("norm_alpha", 2)
    assert role_of("layers.2.attention.body.norm_query.weight") == Role("norm_gain", 2)
    assert role_of("layers.2.feedforward.gain") == Role("gain", 2)
    assert role_of("layers.2.mix") == Role("mix", 2)
    assert role_of("projection.weight") == Role("projection", None)
    assert role_of("layers.1.attention.body.key.up.bias") == Role("bias", 1)
    assert role_of("layers.1.attention.body.key.up.weight", reparametrised=True) == Role(
        "key", 1, "up", reparametrised=True
    )


def test_roles_tell_which_matrices_are_spectrally_normalised():
    found = roles(Decoder(_config("sigma_reparam", options=(SigmaOptions(targets="attention"),)), "fp32"))
    assert {role.kind for role in found.values() if role.reparametrised} == {"query", "key", "value", "output"}
    assert {role.kind for role in found.values() if not role.reparametrised} >= {
        "fc1",
        "fc2",
        "gamma",
        "embedding",
        "head",
    }
    assert len(roles(Decoder(_config("sigma_reparam"), "fp32"))) == len(found) + 2 * 2


def test_a_tied_head_has_no_role_of_its_own():
    tied, untied = (Decoder(_config("pre_ln", tie_embeddings=tie), "fp32") for tie in (True, False))
    assert roles(untied).keys() - roles(tied).keys() == {"head.weight"}


@pytest.mark.parametrize(
    ("method", "decaying"),
    [
        ("gpt2", {"query", "key", "value", "output", "fc1", "gate", "fc2", "head"}),
        ("mlra", {"query", "key", "value", "output", "fc1", "gate", "fc2", "head"}),
        ("catformer", {"query", "key", "value", "output", "fc1", "gate", "fc2", "head", "projection"}),
        ("sigma_reparam", {"head"}),
        ("denseformer", {"query", "key", "value", "output", "fc1", "gate", "fc2", "head"}),
        ("rezero", {"query", "key", "value", "output", "fc1", "gate", "fc2", "head"}),
    ],
)
def test_decay_is_for_matrices_whose_size_means_something(method, decaying):
    config = _config(method, tie_embeddings=False, activation="swiglu", norm="dyt", options=(CATFORMER,))
    found = roles(Decoder(config, "fp32"))
    assert {role.kind for role in found.values() if decays(role)} == decaying
    assert {role.kind for role in found.values()} > decaying


def test_constant_starts():
    dense, rezero = _built("denseformer"), _built("rezero", norm="dyt", placement="pre")
    assert dense.get_parameter("layers.1.mix").tolist() == [0, 0, 1]
    assert rezero.get_parameter("layers.1.attention.gain").tolist() == [0]
    assert rezero.get_parameter("layers.1.attention.norm_in.alpha").tolist() == [0.5]
    other = _built("pre_ln", norm="dyt", norm_alpha=0.8, bias=True)
    assert other.get_parameter("norm_final.alpha").tolist() == pytest.approx([0.8])
    assert not other.get_parameter("norm_final.bias").any()


@pytest.mark.parametrize("gamma", ["spectral", "one"])
def test_a_spectrally_normalised_matrix_comes_with_its_gain_and_vectors(gamma):
    config = _config("sigma_reparam", options=(SigmaOptions(gamma=gamma),))
    decoder, plain = Decoder(config, "fp32"), Decoder(_config("pre_ln"), "fp32")
    initialise(decoder, config, 0)
    initialise(plain, plain.config, 0)
    for name, weight in plain.named_parameters():
        assert torch.equal(decoder.get_parameter(name), weight), name  # W itself starts as without
    for linear in (part for part in decoder.layers.modules() if isinstance(part, Linear)):
        assert linear.gamma is not None
        sigma = torch.linalg.matrix_norm(linear.weight.double(), ord=2).item()
        assert linear.gamma.item() == pytest.approx(sigma if gamma == "spectral" else 1.0, rel=1e-6)
        assert linear.u.norm().item() == pytest.approx(1, abs=1e-6)
        product = linear.weight.double() @ linear.u.double()
        torch.testing.assert_close(product, sigma * linear.v.double(), rtol=0, atol=1e-5 * sigma)


def test_orthogonal_matrices_keep_the_size_of_their_input():
    decoder = _built("e_spa", kv_heads=4, d_ff=512)
    query, key, value = (decoder.get_parameter(f"layers.1.attention.body.{kind}.weight") for kind in _HEADS)
    wide, narrow = (decoder.get_parameter(f"layers.1.feedforward.body.{kind}.weight") for kind in ("fc1", "fc2"))
    torch.testing.assert_close(value @ value.T, torch.eye(128), rtol=0, atol=1e-5)
    torch.testing.assert_close(wide.T @ wide, 4 * torch.eye(128), rtol=0, atol=1e-5)
    torch.testing.assert_close(narrow @ narrow.T, torch.eye(128), rtol=0, atol=1e-5)
    assert not query.any()
    assert key.std().item() == pytest.approx(1 / math.sqrt(128), rel=0.05)


def _built(method: str, **keys) -> Decoder:
    config = _config(method, **keys)
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    return decoder


def test_values_depend_on_seed_and_name_alone():
    shallow, deep = _config("pre_ln"), _config("pre_ln", n_layers=5)
    name = "layers.1.attention.body.query.weight"
    role = role_of(name)
    value = initial_value(name, role, (128, 128), shallow, 3)
    torch.manual_seed(11)  # the global generator plays no part
    decoder = Decoder(deep, "fp32")
    initialise(decoder, deep, 3)
    assert torch.equal(decoder.get_parameter(name), value)
    assert not torch.equal(initial_value(name, role, (128, 128), shallow, 4), value)
    other = name.replace("layers.1", "layers.0")
    assert not torch.equal(initial_value(other, role_of(other), (128, 128), shallow, 3), value)
    assert (value.dtype, value.device.type) == (torch.float32, "cpu")


def test_different_parameters_are_uncorrelated():
    config = _config("pre_ln")
    names = [f"layers.{layer}.attention.body.{kind}.weight" for layer in (0, 1) for kind in ("query", "output")]
    values = torch.stack([initial_value(name, role_of(name), (128, 128), config, 0).flatten() for name in names])
    off_diagonal = torch.corrcoef(values) - torch.eye(4)
    assert off_diagonal.abs().max() < 5 / math.sqrt(128 * 128)


def test_values_do_not_depend_on_precision_or_the_device_of_construction():
    config = _config("gpt2")
    with torch.device("meta"):
        moved = Decoder(config, "fp64")
    moved.to_empty(device="cpu")
    direct = Decoder(config, "bf16")
    initialise(moved, config, 1)
    initialise(direct, config, 1)
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter.double(), moved.get_parameter(name)), name


def test_the_sequence_of_values_is_pinned():
    """Runs are resumed and compared across versions, so a change of the draw must be seen."""
    value = initial_value("embedding.weight", Role("embedding", None), (4, 128), _config("pre_ln"), 0)
    torch.testing.assert_close(value[0, :3], torch.tensor(PINNED), rtol=1e-5, atol=1e-7)


PINNED = [-0.1543593406677246, 0.10892218351364136, 0.1054818406701088]


def _variances(config: ModelConfig, seed: int) -> list[float]:
    """The stream variance at the input of each layer and after the last one."""
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, seed)
    variances = []
    for module in decoder.modules():
        if isinstance(module, Layer):
            module.register_forward_hook(
                lambda _, args, out: variances.extend(x[0].var().item() for x in (args[0], out))
            )
    tokens = torch.randint(512, (2, 64), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        decoder(tokens)
    return [*variances[::2], variances[-1]]


def test_pre_ln_variance_grows_linearly_with_xavier():
    """Slope a layer (2 d/(d + d_head)) r_eff + a feed-forward part; 1.86 at r 0.96 for relu, less for gelu."""
    config = _config("pre_ln", n_layers=32, kv_heads=4, d_ff=512, activation="relu")
    v = torch.tensor([_variances(config, seed) for seed in range(3)]).mean(dim=0)
    late = (v[32] - v[16]) / 16
    assert 1.86 * 0.7 < late < 1.86 * 1.3
    assert late == pytest.approx(((v[24] - v[16]) / 8).item(), rel=0.3)
    assert v[32] / v[1] > 30


def test_gpt2_init_keeps_the_variance_of_order_one_at_any_depth():
    """Branches of std 1/sqrt(2 n_layers) add a bounded amount however deep."""
    growth = []
    for n_layers in (8, 32):
        v = _variances(_config("gpt2", n_layers=n_layers, kv_heads=4, d_ff=512), 0)
        growth.append(v[-1] - v[0])
    assert 0.4 < growth[1] / growth[0] < 2.5


def test_post_ln_normalises_the_stream_after_every_layer():
    v = _variances(_config("post_ln", n_layers=6), 0)
    assert v[1:] == pytest.approx([1.0] * 6, rel=0.01)


def test_residual_stream_alone_with_zero_branches_is_the_embedding():
    config = replace(_config("pre_ln"), tie_embeddings=True)
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, 0)
    with torch.no_grad():
        for name, role in roles(decoder).items():
            if role.kind in ("output", "fc2"):
                decoder.get_parameter(name).zero_()
    tokens = torch.arange(8)[None]
    x = decoder.embedding(tokens)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.norm_eps).sqrt()
    torch.testing.assert_close(decoder(tokens), expected)
