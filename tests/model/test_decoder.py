"""The decoder against an independent one, its masking, precision, recompute and compilation."""

import shutil
from collections.abc import Iterable

import pytest
import torch
from plain_decoder import build, plain_logits, plain_sums, sample, small_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stablelm.methods.catalogue import METHODS
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise
from stablelm.model.norms import Norm
from stablelm.model.sublayer import Layer

CONFIGS = {
    "pre_ln": small_config("pre_ln"),
    "post_ln": small_config("post_ln"),
    "gpt2": small_config("gpt2"),
    "grouped": small_config("pre_ln", kv_heads=2, activation="swiglu", norm="rmsnorm"),
    "one_kv_head": small_config("post_ln", kv_heads=1, activation="relu", bias=True, tie_embeddings=True),
    "no_positions": small_config("gpt2", position="none", tie_embeddings=False),
    "small_rope_base": small_config("pre_ln", norm="rmsnorm", bias=True, tie_embeddings=True),
}
Z_LOSS = 1e-3


def _gradients_of(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}


def _both(name: str, precision: str) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(our total, plain total, our gradients, plain gradients) of a config."""
    config = CONFIGS[name]
    decoder = build(config, precision)
    tokens, targets = sample(config)
    ours = decoder(tokens, targets, z_loss=Z_LOSS)
    ours.total.backward()
    weights = {n: p.detach().clone().requires_grad_() for n, p in decoder.named_parameters()}
    cross_entropy, z = plain_sums(weights, config, tokens, targets)
    assert ours.valid.item() == (targets != -100).sum().item()
    assert ours.cross_entropy.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    plain = cross_entropy + Z_LOSS * z
    plain.backward()
    return ours.total, plain, _gradients_of(decoder.named_parameters()), _gradients_of(weights.items())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-10), ("fp32", 1e-5)])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_equal_the_plain_decoder(name, precision, tolerance):
    ours, plain, gradients, plain_gradients = _both(name, precision)
    assert ours.item() == pytest.approx(plain.item(), rel=tolerance)
    assert gradients.keys() == plain_gradients.keys()
    # Without rope the gradient of a key bias is zero but for rounding, so the whole gradient gives a floor.
    floor = 1e-4 * max(gradient.norm() for gradient in plain_gradients.values())
    for parameter, gradient in gradients.items():
        difference = (gradient - plain_gradients[parameter]).norm()
        assert difference <= tolerance * (plain_gradients[parameter].norm() + floor), parameter


def test_hidden_states_give_the_plain_logits():
    config = CONFIGS["gpt2"]
    decoder = build(config, "fp64")
    tokens, _ = sample(config)
    hidden = decoder(tokens)
    assert hidden.shape == (*tokens.shape, config.d_model)
    weights = {n: p.detach() for n, p in decoder.named_parameters()}
    torch.testing.assert_close(hidden @ decoder.head_weight().T, plain_logits(weights, config, tokens))


@pytest.mark.parametrize("name", ["grouped", *METHODS])
def test_later_tokens_do_not_reach_earlier_positions(name):
    config = CONFIGS[name] if name in CONFIGS else small_config(name)
    decoder = build(config, "fp64")
    tokens, _ = sample(config)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 96
    before, after = decoder(tokens), decoder(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=0)
    assert (before[:, 6:] - after[:, 6:]).abs().amin(dim=-1).max() > 0


def test_post_ln_hidden_states_have_unit_variance():
    config = small_config("post_ln")
    decoder = Decoder(config, "fp32")
    initialise(decoder, config, 0)
    hidden = decoder(sample(config)[0])
    torch.testing.assert_close(hidden.var(dim=-1, unbiased=False), torch.ones(hidden.shape[:-1]), rtol=1e-3, atol=0)


def test_a_sequence_beyond_the_learned_positions_is_refused():
    decoder = build(CONFIGS["gpt2"])
    with pytest.raises(AssertionError, match=r"model\.max_seq_len"):
        decoder(torch.zeros(1, 25, dtype=torch.long))


def test_dropout_acts_in_training_only():
    config = small_config("pre_ln", dropout=0.2)
    decoder = build(config)
    tokens, _ = sample(config)
    assert not torch.equal(decoder(tokens), decoder(tokens))
    decoder.eval()
    torch.testing.assert_close(decoder(tokens), decoder(tokens), rtol=0, atol=0)
    without = build(small_config("pre_ln"))
    torch.testing.assert_close(decoder(tokens), without(tokens), rtol=0, atol=0)


def _dtypes_seen(decoder: Decoder, tokens: torch.Tensor) -> dict[str, set[torch.dtype]]:
    """The dtypes of the stream between layers, of norm outputs and of the inputs of the bodies."""
    seen: dict[str, set[torch.dtype]] = {"stream": set(), "norm": set(), "body": set()}
    for module in decoder.modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda _, args, out: seen["stream"].update({args[0][0].dtype, out[0].dtype}))
            for body in (module.attention.body, module.feedforward.body):
                body.register_forward_pre_hook(lambda _, args: seen["body"].update(part.dtype for part in args[0]))
        if isinstance(module, Norm):
            module.register_forward_hook(lambda _, args, out: seen["norm"].add(out.dtype))
    decoder(tokens)
    return seen


@pytest.mark.parametrize("method", ["pre_ln", "post_ln", "gpt2"])
@pytest.mark.parametrize("stream_dtype", ["fp32", "bf16"])
def test_bf16_multiplies_in_bf16_and_keeps_the_stream_as_configured(method, stream_dtype):
    config = small_config(method, stream_dtype=stream_dtype)
    decoder = build(config, "bf16")
    tokens, targets = sample(config)
    seen = _dtypes_seen(decoder, tokens)
    stream = torch.float32 if stream_dtype == "fp32" else torch.bfloat16
    assert seen == {"stream": {stream}, "norm": {stream}, "body": {torch.bfloat16}}
    assert decoder(tokens).dtype == torch.bfloat16
    sums = decoder(tokens, targets)
    sums.total.backward()
    assert sums.total.dtype == sums.cross_entropy.dtype == torch.float32
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in decoder.parameters() if p.grad is not None} == {torch.float32}


def test_bf16_stays_near_fp32():
    config = CONFIGS["pre_ln"]
    tokens, targets = sample(config)
    exact, rounded = (build(config, precision)(tokens, targets).total for precision in ("fp32", "bf16"))
    assert rounded.item() == pytest.approx(exact.item(), rel=5e-3)
    assert rounded.item() != exact.item()


def test_fp64_is_fp64_throughout():
    config = CONFIGS["pre_ln"]
    decoder = build(config, "fp64")
    tokens, targets = sample(config)
    assert _dtypes_seen(decoder, tokens) == {kind: {torch.float64} for kind in ("stream", "norm", "body")}
    assert decoder(tokens, targets).total.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_built_on_meta_and_on_cpu_alike(method):
    config = small_config(method)
    tokens, targets = sample(config)
    with torch.device("meta"):
        decoder = Decoder(config, "fp32")
    assert all(tensor.is_meta for tensor in (*decoder.parameters(), *decoder.buffers()))
    assert len(list(decoder.buffers())) == (3 * 3 * 6 if config.reparam == "sigma" else 0)
    decoder.to_empty(device="cpu")
    initialise(decoder, config, 3)
    direct = Decoder(config, "fp32")
    initialise(direct, config, 3)
    assert torch.equal(decoder(tokens, targets).total, direct(tokens, targets).total)


def _gradients(decoder: Decoder, tokens, targets, rng_seed: int) -> dict[str, Tensor]:
    torch.manual_seed(rng_seed)
    decoder(tokens, targets).total.backward()
    return _gradients_of(decoder.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_recompute_changes_nothing_with_dropout_on(method):
    config = small_config(method, dropout=0.1)
    tokens, targets = sample(config)
    kept, recomputed = build(config), build(config)
    for layer in recomputed.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    expected = _gradients(kept, tokens, targets, 7)
    for name, gradient in _gradients(recomputed, tokens, targets, 7).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", ["pre_ln", "post_ln", "grouped"])
def test_compiled_layers_equal_eager_ones(name):
    torch.compiler.reset()
    config = CONFIGS[name]
    tokens, targets = sample(config)
    eager, compiled = build(config), build(config)
    for layer in compiled.layers:
        layer.compile()
    expected = _gradients(eager, tokens, targets, 0)
    for parameter, gradient in _gradients(compiled, tokens, targets, 0).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize(
    ("method", "precision"),
    [(method, precision) for method in ("pre_ln", "post_ln", "gpt2") for precision in ("fp32", "bf16")]
    + [(method, "fp32") for method in ("magneto", "sigma_reparam", "deepscalelm_pre", "deepnorm", "rezero", "mlra")]
    + [(method, "fp32") for method in ("layerscale", "skipinit", "admin", "normformer", "resi_dual")],
)
def test_all_layers_share_one_graph(method, precision):
    assert len(_graphs(method, precision)) == 1


@pytest.mark.parametrize("method", ["keel", "mix_ln"])
def test_layers_with_norms_at_the_same_places_share_a_graph(method):
    assert len(_graphs(method, "fp32")) == 2


def _graphs(method: str, precision: str) -> list:
    """What ten layers are compiled to."""
    torch.compiler.reset()
    config = small_config(method, n_layers=10)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    decoder = build(config, precision)
    for layer in decoder.layers:
        layer.compile(backend=backend, fullgraph=True)
    tokens, targets = sample(config)
    decoder(tokens, targets).total.backward()
    return graphs
