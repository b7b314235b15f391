"""Closed-form counts against the parameters and the operations of the real model."""

import pytest
import torch
from plain_decoder import build, sample, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stablelm.methods.catalogue import METHODS
from stablelm.methods.sigma_reparam import SigmaOptions
from stablelm.methods.sizes import d_head, flops_per_token, parameter_counts, stream_multiplications
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import roles

SHAPES = {
    "pre_ln": small_config("pre_ln"),
    "post_ln": small_config("post_ln", bias=True),
    "gpt2": small_config("gpt2"),
    "grouped_swiglu": small_config("pre_ln", kv_heads=2, activation="swiglu", norm="rmsnorm", bias=True),
    "tied": small_config("pre_ln", tie_embeddings=True, d_ff=56),
    "catformer_grouped_swiglu": small_config("catformer", kv_heads=2, activation="swiglu", bias=True),
    "sigma_attention_dyt": small_config(
        "sigma_reparam", norm="dyt", bias=True, options=(SigmaOptions(targets="attention"),)
    ),
}
SHAPES = {method: small_config(method) for method in METHODS} | SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_real_model(name):
    config = SHAPES[name]
    decoder = build(config)
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    kinds = {name: role.kind for name, role in roles(decoder).items()}
    counts = parameter_counts(config)
    assert counts["total"] == sum(sizes.values())
    assert counts["embedding"] == sum(n for name, n in sizes.items() if kinds[name] in ("embedding", "position"))
    assert counts["head"] == sizes.get("head.weight", 0)
    assert counts["layers"] == sum(n for name, n in sizes.items() if name.startswith("layers."))
    layers = [decoder.layers[layer] for layer in decoder.places]
    parts = [p for part in (*layers, decoder.projection) if part is not None for p in part.parameters()]
    matrices = sum(p.numel() for p in parts if p.ndim == 2)
    assert counts["matmul"] == matrices + decoder.head_weight().numel()


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name):
    config = SHAPES[name]
    decoder = build(config)
    tokens, targets = sample(config, batch=2, seq_len=16)
    if config.axes.stream.grows:  # read in parts: one buffer is multiplied with zeros besides
        decoder.tap = lambda _, chunks: chunks
    # The plain kernel computes the masked half as well, so it counts attention twice.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(tokens, targets).total.backward()
    matmul = 6 * parameter_counts(config)["matmul"]
    stream = 6 * stream_multiplications(config)
    attention = flops_per_token(config, 16) - matmul - stream
    assert attention > 0
    # Beside a key without a value there are a query and eight features more.
    more = 1.0 if config.axes.softmax.null_at_start is None else (17 / 16) ** 2 * (8 + d_head(config)) / d_head(config)
    assert counter.get_total_flops() == tokens.numel() * (matmul + stream + 2 * attention * more)


def test_meta_construction_needs_no_memory_for_a_large_model():
    config = small_config("pre_ln", n_layers=48, d_model=2048, n_heads=16, kv_heads=4, vocab_size=32000)
    with torch.device("meta"):
        decoder = Decoder(config, "bf16")
    assert sum(p.numel() for p in decoder.parameters()) == parameter_counts(config)["total"] > 2e9
