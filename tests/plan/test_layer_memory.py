"""What layers keep, measured on fake tensors, against what autograd saves in a real step."""

import pytest
from planned import kept_in_a_real_step, planned

from stablelm.methods.catalogue import METHODS
from stablelm.model.memory import layer_memory

VARIANTS = {
    "kv_heads": ("model.kv_heads=2", "data.seq_len=80"),
    "swiglu_sub": ("model.method=magneto", "model.activation=swiglu"),
    "dyt": ("model.norm=dyt",),
    "logit_cap": ("model.attention.logit_cap=30",),
    "learned": ("model.attention.position=learned",),
    "bias": ("model.bias=true",),
    "bf16_stream": ("model.stream_dtype=bf16",),
    "sigma_attention": ("model.method=sigma_reparam", "model.sigma.targets=attention"),
}
CASES = {name: (f"model.method={name}",) for name in METHODS} | VARIANTS
for name in ("gtrxl", "sas", "sas_p", "catformer", "catformer_sigma"):  # as activations would have matrices' shapes
    CASES[name] += ("data.seq_len=75",)


EACH = ("pre_ln", "deepscalelm_pre", "sigma_reparam", "catformer")
COMBINATIONS = [(name, "bf16", "none") for name in CASES] + [
    (name, precision, recompute)
    for name in EACH
    for precision, recompute in (("bf16", "full"), ("fp32", "none"), ("fp32", "full"))
]
COMBINATIONS += [("magneto", "fp32", "none"), ("denseformer", "bf16", "full")]


SLOW = {each for each in COMBINATIONS if each[0] in ("catformer", "catformer_sigma")}


@pytest.mark.parametrize(
    ("name", "precision", "recompute"),
    [pytest.param(*each, marks=pytest.mark.slow if each in SLOW else ()) for each in COMBINATIONS],
)
def test_kept_bytes_are_those_of_a_real_step(name: str, precision: str, recompute: str):
    layers = "model.n_layers=20" if "catformer" in name else "model.n_layers=4"
    config = planned(*CASES[name], layers, f"train.precision={precision}", f"engine.recompute={recompute}")
    real = kept_in_a_real_step(config)
    found = layer_memory.measure(config)
    assert found.kept == pytest.approx(real["activations"], rel=0.05)
    # Some copies have the shape of an activation: only the sum is sure.
    assert found.kept + found.weight_copies(sharded=False) == pytest.approx(real.total(), rel=0.05)


def test_recompute_keeps_a_layers_input_only():
    whole, little = (
        layer_memory.measure(planned("model.n_layers=8", f"engine.recompute={mode}")) for mode in ("none", "full")
    )
    assert little.kept < 0.15 * whole.kept
    assert little.temporary > whole.layers / 8  # a layer is computed again


@pytest.mark.parametrize(
    "method",
    [
        "pre_ln",
        "value_residual",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("denseformer", "catformer")),
    ],
)
def test_few_layers_and_sequences_stand_for_many(method: str):
    sizes = ("model.n_layers=72", "train.global_batch_size=5", "train.micro_batch_size=5", "data.seq_len=32")
    config = planned(f"model.method={method}", *sizes)
    found = layer_memory.measure(config)
    assert found.alike == (method in ("pre_ln", "value_residual"))
    real = kept_in_a_real_step(config).total()
    assert found.kept + found.weight_copies(sharded=False) == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize(
    ("mode", "elements"),
    [
        # Of a token and layer at width d, beside the stream that enters it:
        ("none", 2 + 1 + 2 + 1 + 1 + 8),  # normed twice, value, query and key turned, mixed, stream between, fc1, gelu
        ("selective", 3 + 1 + 1 + 4 + 1),  # results of query, key, value, attention, output, fc1 and fc2
        ("attention", 1 + 1 + 8),  # stream between, normed, fc1, gelu
        ("full", 0),
    ],
)
def test_what_a_layer_keeps_follows_from_its_operations(mode: str, elements: int):
    """fp32, pre_ln: all in units of 4 d bytes a token, up to statistics of norms and attention."""
    config = planned("model.method=pre_ln", "model.n_layers=8", f"engine.recompute={mode}", "train.precision=fp32")
    tokens, d_model = 2 * config.data.seq_len, config.model.d_model
    kept = layer_memory.measure(config).last_layer / (4 * d_model * tokens)
    assert kept == pytest.approx(1 + elements, abs=0.25)


def test_each_third_layer_keeps_its_input_only():
    plain, full, some = (
        layer_memory.measure(planned("model.n_layers=9", f"engine.recompute={mode}")).layers
        for mode in ("none", "full", "every:3")
    )
    assert some == pytest.approx((2 * plain + full) / 3, rel=1e-6)
