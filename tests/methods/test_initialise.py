"""Initial values: stds by role, independence, and what they do to the signal."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import apply_method
from stablelm.methods.initialise import Role, decays, initial_std, initial_value, initialise, role_of, roles
from stablelm.model.decoder import Decoder
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


def _config(method: str, **keys) -> ModelConfig:
    return apply_method(ModelConfig(method=method, **(SIZES | keys)))


def _stds(init: str, n_layers: int) -> dict[str, float]:
    """The stds of the sheets for SIZES (d 128, d_head 32, d_ff 384), written out."""
    if init == "gpt2":
        small = 0.02 / math.sqrt(2 * n_layers)
        stds = dict.fromkeys(("embedding", "position", "head", "query", "key", "value", "fc1", "gate"), 0.02)
        return stds | {"output": small, "fc2": small}
    heads = dict.fromkeys(("query", "key", "value"), math.sqrt(2 / (128 + 32)))
    tables = dict.fromkeys(("embedding", "position", "head"), 1 / math.sqrt(128))
    wide = dict.fromkeys(("fc1", "gate", "fc2"), math.sqrt(2 / (128 + 384)))
    return heads | tables | wide | {"output": 1 / math.sqrt(128)}


@pytest.mark.parametrize("init", ["gpt2", "xavier"])
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


def test_a_tied_head_has_no_role_of_its_own():
    tied, untied = (Decoder(_config("pre_ln", tie_embeddings=tie), "fp32") for tie in (True, False))
    assert roles(untied).keys() - roles(tied).keys() == {"head.weight"}


def test_decay_is_for_matrices():
    decoder = Decoder(_config("gpt2", tie_embeddings=False, activation="swiglu"), "fp32")
    decaying = {role.kind for role in roles(decoder).values() if decays(role)}
    assert decaying == {"query", "key", "value", "output", "fc1", "gate", "fc2", "head"}


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
