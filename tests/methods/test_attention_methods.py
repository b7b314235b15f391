"""Gates, softmax variants, shaped attention, simplified blocks, WeSaR and scaled embeddings: against plain equations,
and what the papers say of their start."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from model.plain_decoder import build, sample, small_config
from plain_attention import plain_loss
from support.parity import assert_parity

from stablelm.config.identity import differences
from stablelm.config.schema import ModelConfig
from stablelm.methods.catalogue import apply_method
from stablelm.methods.gated_attention import GateOptions
from stablelm.methods.sizes import flops_per_token, parameter_counts
from stablelm.methods.softmax_variants import ClippedOptions
from stablelm.methods.wesar import WesarOptions
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import decays, initialise, roles

END = 5


def variant(
    method: str, options: tuple[Any, ...] = (), keys: dict[str, Any] | None = None, **attention: Any
) -> ModelConfig:
    config = small_config(method, **(keys or {}))
    return replace(config, attention=replace(config.attention, **attention), options=options)


GROUPED, START = {"kv_heads": 2}, (GateOptions(start=0.25),)
CONFIGS = {
    "elementwise": variant("gated_attention"),
    "headwise": variant("gated_attention", START, GROUPED, gate="headwise", position="alibi"),
    "gate_rope_bias": variant("gated_attention", START, GROUPED, document_end=END),
    "off_by_one": variant("softmax_one", keys=GROUPED),
    "off_by_one_documents": variant("softmax_one", keys=GROUPED, document_end=END, logit_cap=3.0),
    "sink": variant("attention_sink", keys=GROUPED),
    "sink_alibi": variant("attention_sink", keys=GROUPED, position="alibi", document_end=END),
    "sink_capped": variant("attention_sink", logit_cap=2.0, gate="headwise"),
    "clipped": variant("clipped_softmax", (ClippedOptions(1.03, 2.0),), GROUPED),
    "clipped_alibi": variant("clipped_softmax", (ClippedOptions(1.1, 1.0),), position="alibi", document_end=END),
    "shaped": variant("shaped_attention", keys=GROUPED),
    "shaped_documents": variant("shaped_attention", document_end=END, softmax="sink", gate="elementwise"),
    "shaped_alibi": variant("shaped_attention", keys={"placement": "pre"}, position="alibi", logit_cap=1.0),
    "sas": variant("sas"),
    "sas_p": variant("sas_p", position="alibi"),
    "sas_p_no_norm": variant("sas_p", keys={"placement": "none"}, document_end=END),
    "sas_gate": variant("sas", gate="elementwise", softmax="off_by_one"),
    "wesar": variant("wesar", gate="headwise"),
    "wesar_sas": variant("sas", keys={"reparam": "wesar"}),
    "scaled_embed": variant("scaled_embed", keys={"embedding_gradient_scale": 0.1}),
    "embed_ln": variant("embed_ln", keys={"embedding_gradient_scale": 0.5}),
}


def moved(config: ModelConfig) -> Decoder:
    """With gains off 1, and queries off 0, in float64."""
    decoder = build(config, "fp64")
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith("query.weight") and not parameter.any():
                parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(2))
            elif parameter.ndim == 2 and ".body." in name and config.placement == "pre" and config.reparam == "none":
                parameter.mul_(2)  # so that weights are far from uniform
    return decoder


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_equations(name: str, record_property):
    config = CONFIGS[name]
    decoder, (tokens, targets) = moved(config), sample(config, seq_len=13)
    tokens[tokens % 7 == 0] = END
    weights = {each: value.detach().clone().requires_grad_() for each, value in decoder.named_parameters()}
    wanted = plain_loss(weights, config, tokens, targets)
    sums = decoder(tokens, targets)
    theirs = dict(zip(weights, torch.autograd.grad(wanted, list(weights.values())), strict=True))
    sums.total.backward()
    gradients = {each: (parameter.grad, theirs[each]) for each, parameter in decoder.named_parameters()}
    assert_parity(record_property, config.method, (sums.total, wanted), gradients)


@pytest.mark.parametrize("method", ["sas", "sas_p"])
@pytest.mark.parametrize("length", [1, 7, 24])
def test_simplified_attention_starts_as_the_identity(method: str, length: int):
    """With queries of zero and gains of 1, for any length (He & Hofmann, section 4.1)."""
    decoder = Decoder(config := small_config(method), "fp64")
    initialise(decoder, config, 0)
    tokens, _ = sample(config, seq_len=length)
    chunks = decoder.stream.start(decoder.embed(tokens))
    attention: Any = decoder.get_submodule("layers.0.attention")
    branch = attention.body(attention.enter(chunks)[1], decoder.positions(tokens))
    torch.testing.assert_close(branch, attention.norm_in(chunks[0]), rtol=0, atol=1e-12)


def test_sas_and_sas_p_start_as_one_function():
    """Attention gives the normed input, so that both feed-forwards read the same but for the eps of the norm."""
    hidden = []
    for method in ("sas", "sas_p"):
        decoder = Decoder(config := small_config(method), "fp64")
        initialise(decoder, config, 0)
        hidden.append(decoder(sample(config)[0]).detach())
    torch.testing.assert_close(hidden[0], hidden[1], rtol=0, atol=1e-4)


def test_wesar_starts_as_its_plain_twin_with_one_std():
    config = small_config("wesar", d_model=64)
    ours, plain = Decoder(config, "fp32"), Decoder(twin := replace(config, reparam="none"), "fp32")
    initialise(ours, config, 0)
    initialise(plain, twin, 0)
    tokens, _ = sample(config)
    torch.testing.assert_close(ours(tokens), plain(tokens), rtol=1e-5, atol=1e-5)
    stds = {n: p.std().item() for n, p in ours.named_parameters() if p.ndim == 2 and "layers" in n}
    assert all(std == pytest.approx(WesarOptions().std, rel=0.1) for std in stds.values())
    assert len({round(p.item(), 4) for n, p in ours.named_parameters() if n.endswith("matrix_gain")}) > 2
    decayed = {name for name, role in roles(ours).items() if decays(role)}
    assert decayed == {*stds, "head.weight"}  # a gain does not make the size of a matrix meaningless


def test_an_embeddings_gradient_is_scaled_and_its_value_is_not():
    full, tenth = (small_config(embedding_gradient_scale=share) for share in (1.0, 0.1))
    tokens, targets = sample(full)
    found = []
    for config in (full, tenth):
        decoder = build(config, "fp32")
        sums = decoder(tokens, targets)
        gradients = torch.autograd.grad(sums.total, list(decoder.parameters()))
        by_name = dict(zip([name for name, _ in decoder.named_parameters()], gradients, strict=True))
        found.append((sums.total.detach(), by_name["embedding.weight"], by_name["norm_final.weight"]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    torch.testing.assert_close(found[1][1], 0.1 * found[0][1], rtol=1e-5, atol=1e-7)


def test_a_tied_heads_gradient_is_not_scaled():
    config = small_config("gpt2", embedding_gradient_scale=0.0)
    decoder, (tokens, targets) = build(config), sample(config)
    (gradient,) = torch.autograd.grad(decoder(tokens, targets).total, decoder.embedding.weight)
    assert gradient.abs().max() > 0


def test_gates_start_where_they_are_asked_to():
    config = variant("gated_attention", (GateOptions(start=0.2),))
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, 0)
    body: Any = decoder.get_submodule("layers.1.attention.body")
    torch.testing.assert_close(body.gate_bias.sigmoid(), torch.full((32,), 0.2, dtype=torch.float64), rtol=1e-6, atol=0)
    without = Decoder(small_config("gated_attention"), "fp32")
    assert not any(name.endswith("gate_bias") for name, _ in without.named_parameters())


def test_sequences_of_one_token_attend_to_what_adds_to_the_denominator():
    """Half of the weight at a logit of 0 (Miller 2023)."""
    config = variant("softmax_one", keys={"n_layers": 1})
    decoder = Decoder(config, "fp64")
    initialise(decoder, config, 0)
    attention: Any = decoder.get_submodule("layers.0.attention")
    with torch.no_grad():
        attention.body.query.weight.zero_()
    tokens, _ = sample(config, seq_len=1)
    products = attention.enter(decoder.stream.start(decoder.embed(tokens)))[1]
    mixed = attention.body(products, decoder.positions(tokens))
    torch.testing.assert_close(mixed, 0.5 * attention.body.output(products[1]), rtol=1e-12, atol=1e-12)


def test_operations_count_the_gate_and_what_simplified_blocks_leave_out():
    plain, gated, sas = (small_config(name) for name in ("pre_ln", "gated_attention", "sas"))
    per_layer, layers = 32 * 32, plain.n_layers
    counts = {config.method: parameter_counts(config)["matmul"] for config in (plain, gated, sas)}
    assert counts["gated_attention"] == counts["pre_ln"] + layers * per_layer
    assert counts["sas"] == counts["pre_ln"] - 2 * layers * per_layer
    assert flops_per_token(gated, 8) == flops_per_token(plain, 8) + 6 * layers * per_layer


def test_runs_saved_before_the_axes_existed_have_the_plain_values():
    now = {"model.n_layers": 2, "data.order": 2, "model.attention.gate": "none", "model.attention.softmax": "standard"}
    now |= {"model.attention.value_maps": True, "model.gate.start": None, "model.embedding_gradient_scale": 1.0}
    saved = {"model.n_layers": 2, "data.order": 2}
    assert differences(saved, now) == []
    (told,) = differences(saved, now | {"model.attention.gate": "headwise"})
    assert "model.attention.gate" in told and "none" in told


def test_the_shaped_relu_keeps_variance_and_nears_the_identity_with_width():
    for width in (64, 1024):
        activation = apply_method(ModelConfig(method="shaped_attention", d_model=width)).axes.activation
        assert activation.second_moment(1.0) == pytest.approx(1.0)
        assert 1 - activation.correlation(0.0) == pytest.approx(1, abs=1 / width)
        assert math.isclose(activation.output_scale(), 1, abs_tol=1 / math.sqrt(width))
