"""The closed form of what the backward pass needs, against what autograd really keeps."""

import pytest
from planned import kept_in_a_real_step, planned

from stablelm.methods.catalogue import METHODS
from stablelm.plan import activations, memory

# torch's CPU kernels have no fused RMSNorm and no fused attention with a bias; a GPU's keep less.
GPU_ONLY = ("layernorm_scaling", "qk_norm")
VARIANTS = {
    "kv_heads": ("model.kv_heads=2",),
    "swiglu_sub": ("model.method=magneto", "model.activation=swiglu"),
    "dyt": ("model.norm=dyt",),
    "logit_cap": ("model.attention.logit_cap=30",),
    "learned": ("model.attention.position=learned",),
    "bias": ("model.bias=true",),
    "bf16_stream": ("model.stream_dtype=bf16",),
    "sigma_attention": ("model.method=sigma_reparam", "model.sigma.targets=attention"),
}
CASES = {name: (f"model.method={name}",) for name in METHODS if name not in GPU_ONLY} | VARIANTS


EACH = ("pre_ln", "deepscalelm_pre", "sigma_reparam", "catformer")
COMBINATIONS = [(name, "bf16", "none") for name in CASES] + [
    (name, precision, recompute)
    for name in EACH
    for precision, recompute in (("bf16", "full"), ("fp32", "none"), ("fp32", "full"))
]
COMBINATIONS += [("magneto", "fp32", "none"), ("denseformer", "bf16", "full")]


@pytest.mark.parametrize(("name", "precision", "recompute"), COMBINATIONS)
def test_kept_bytes_are_those_of_a_real_step(name: str, precision: str, recompute: str):
    layers = "model.n_layers=20" if "catformer" in name else "model.n_layers=4"
    config = planned(*CASES[name], layers, f"train.precision={precision}", f"engine.recompute={recompute}")
    real = kept_in_a_real_step(config)
    assert activations.kept(config) == pytest.approx(real["activations"], rel=0.05)
    layout = memory.make_layout(config, "single", 1, 1)
    copies = memory.weight_copies(config, memory.parameters(config), layout)
    # Some copies have the shape of an activation; the sum tells nothing twice.
    assert activations.kept(config) + copies == pytest.approx(real.total(), rel=0.05)


def test_recompute_keeps_a_layers_input_only():
    whole, little = (planned("model.n_layers=8", f"engine.recompute={mode}") for mode in ("none", "full"))
    assert activations.recomputed(whole) == 0
    assert activations.recomputed(little) == activations.layer(whole.model, activations.sizes_of(whole), 7)
    assert activations.kept(little) < 0.15 * activations.kept(whole)
