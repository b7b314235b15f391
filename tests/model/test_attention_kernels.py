"""Which attention kernel is chosen, and that every kernel sees the same logits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_decoder import build, small_config
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.model.attention.attention_kernels import Gpu, Kernel, choose, described, gpu_of, order, preferred
from stablelm.model.attention.body import Attention
from stablelm.model.attention.positions import Positions, positions_of
from stablelm.model.decoder import Decoder
from stablelm.model.sublayer import Layer
from stablelm.observe.layer_hooks import attention_figures

END = 1
CPU = torch.device("cpu")
TURING, AMPERE, HOPPER, BLACKWELL = (Gpu(capability) for capability in ((7, 5), (8, 0), (9, 0), (10, 0)))
WIDE = {"d_model": 64, "max_seq_len": 256}  # heads of 16


def variant(method: str = "pre_ln", *, position: str | None = None, sizes: Any = None, **attention: Any) -> ModelConfig:
    config = small_config(method, position=position, **(WIDE | (sizes or {})))
    return replace(config, attention=replace(config.attention, **attention))


GROUPED = {"kv_heads": 2}
CONFIGS = {
    "plain": variant(sizes=GROUPED),
    "documents": variant(sizes=GROUPED, document_end=END),
    "alibi": variant(position="alibi", sizes=GROUPED),
    "capped": variant(logit_cap=2.0),
    "capped alibi documents": variant(position="alibi", sizes=GROUPED, document_end=END, logit_cap=2.0),
    "learned documents": variant("gpt2", document_end=END),
    "e_spa": variant("e_spa"),
    "sink": variant(sizes=GROUPED, softmax="sink"),
    "sink alibi documents": variant(position="alibi", sizes=GROUPED, document_end=END, softmax="sink", logit_cap=2.0),
    "off by one documents": variant(document_end=END, softmax="off_by_one"),
    "shaped documents": variant(sizes=GROUPED, document_end=END, shaping="shaped", softmax="sink"),
}


CHOICES: list[tuple[str, torch.dtype, Gpu | None, Kernel]] = [
    ("plain", torch.bfloat16, None, "sdpa"),
    ("plain", torch.bfloat16, HOPPER, "sdpa"),
    ("plain", torch.float32, TURING, "sdpa"),
    ("documents", torch.bfloat16, None, "sdpa_masked"),
    ("documents", torch.bfloat16, AMPERE, "varlen"),
    ("documents", torch.bfloat16, BLACKWELL, "varlen"),
    ("documents", torch.float32, AMPERE, "flex"),
    ("documents", torch.float64, AMPERE, "sdpa_masked"),
    ("documents", torch.bfloat16, TURING, "sdpa_masked"),
    ("documents", torch.bfloat16, Gpu((8, 0), flash=False), "flex"),
    ("alibi", torch.bfloat16, None, "sdpa_masked"),
    ("alibi", torch.bfloat16, HOPPER, "flex"),
    ("alibi", torch.bfloat16, Gpu((9, 0), triton=False), "sdpa_masked"),
    ("capped", torch.bfloat16, None, "dense"),
    ("capped", torch.bfloat16, HOPPER, "flex"),
    ("capped", torch.bfloat16, TURING, "dense"),
    ("capped alibi documents", torch.bfloat16, HOPPER, "flex"),
    ("e_spa", torch.bfloat16, HOPPER, "flex"),
    ("e_spa", torch.bfloat16, None, "sdpa_masked"),
    ("sink", torch.bfloat16, None, "sdpa"),
    ("sink", torch.bfloat16, HOPPER, "flex"),
    ("sink", torch.bfloat16, TURING, "sdpa"),
    ("sink", torch.float64, HOPPER, "sdpa"),
    ("off by one documents", torch.bfloat16, HOPPER, "flex"),
    ("off by one documents", torch.bfloat16, None, "sdpa_masked"),
    ("sink alibi documents", torch.bfloat16, None, "dense"),
    ("clipped", torch.bfloat16, HOPPER, "dense"),
    ("clipped", torch.bfloat16, None, "dense"),
]


@pytest.mark.parametrize(("name", "dtype", "gpu", "kernel"), CHOICES)
def test_the_kernel_by_name(name: str, dtype: torch.dtype, gpu: Gpu | None, kernel: Kernel):
    config = variant(softmax="clipped") if name == "clipped" else CONFIGS[name]
    assert choose(config, dtype, gpu) == kernel


def test_dropout_and_heads_that_kernels_do_not_take():
    dropping = replace(CONFIGS["documents"], dropout=0.1)
    assert choose(dropping, torch.bfloat16, HOPPER) == "sdpa_masked"
    assert choose(replace(CONFIGS["capped"], dropout=0.1), torch.bfloat16, HOPPER) == "dense"
    narrow, odd, wide = (variant(document_end=END, sizes={"d_model": 4 * width}) for width in (8, 20, 512))
    assert choose(narrow, torch.bfloat16, HOPPER) == "varlen"
    assert choose(narrow, torch.float32, HOPPER) == "sdpa_masked"
    assert choose(odd, torch.bfloat16, HOPPER) == "flex"
    assert choose(wide, torch.bfloat16, HOPPER) == "sdpa_masked"


def test_the_order_of_fused_kernels():
    plain, dropping = CONFIGS["plain"], replace(CONFIGS["plain"], dropout=0.1)
    for gpu in (None, AMPERE, BLACKWELL):
        assert order(plain, torch.bfloat16, gpu) == ()
    assert order(plain, torch.float32, HOPPER) == ()
    cudnn = ("cudnn", "flash", "efficient", "math")
    assert order(plain, torch.bfloat16, HOPPER) == cudnn
    for own in ("alibi", "documents"):
        assert order(CONFIGS[own], torch.bfloat16, HOPPER) == ()
    installed = Gpu((9, 0), flash3=True)
    for flash in ("plain", "documents"):
        assert order(CONFIGS[flash], torch.bfloat16, installed) == ("flash3", "cudnn", "efficient", "math")
    assert order(dropping, torch.bfloat16, installed) == cudnn
    masked = replace(CONFIGS["alibi"], dropout=0.1)
    for gpu in (TURING, AMPERE, installed):
        assert order(masked, torch.bfloat16, gpu) == ("flash", "efficient", "math")


def test_an_order_holds_inside_its_context_alone():
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    with preferred(("cudnn", "flash", "efficient", "math")):
        assert torch.backends.cuda.cudnn_sdp_enabled()
        found = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(found, wanted)
    with preferred(("flash", "efficient", "math")):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    with preferred(()):
        assert torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_recorded():
    assert described(CONFIGS["alibi"], torch.bfloat16, CPU) == "sdpa_masked"
    assert gpu_of(CPU) is None


def tokens_of(config: ModelConfig, seq_len: int = 150) -> Tensor:
    """(2, seq_len), more than a block of FlexAttention's, with several ends of documents."""
    tokens = torch.randint(2, config.vocab_size or 2, (2, seq_len), generator=torch.Generator().manual_seed(3))
    tokens[0, [3, 4, seq_len // 2, seq_len - 9]] = END
    tokens[1, [0, seq_len - 1]] = END
    return tokens


def reference(decoder: Decoder, tokens: Tensor) -> Positions:
    """With a dense bias."""
    kernel: Kernel = "dense" if decoder.config.attention.logit_cap else "sdpa_masked"
    return positions_of(decoder.config, decoder.dtypes, tokens, kernel)


def first_attention(decoder: Decoder, tokens: Tensor) -> tuple[Attention, tuple[Tensor, ...]]:
    """The attention of layer 1 and its products."""
    layer = decoder.layers[1]
    assert isinstance(layer, Layer)
    body = layer.attention.body
    assert isinstance(body, Attention)
    return body, layer.attention.enter(decoder.stream.start(decoder.embed(tokens)))[1]


def weights_of(attention: Attention, query: Tensor, key: Tensor, positions: Positions) -> Tensor:
    """By the softmax's definition, with what adds to its denominator."""
    powers = attention.logits(query, key, positions).exp()
    nulls = {"sink": getattr(attention, "sink", None), "off_by_one": torch.zeros(4)}
    null = nulls.get(str(attention.config.attention.softmax))
    return powers / (powers.sum(dim=-1, keepdim=True) + (0.0 if null is None else null.exp()[:, None, None]))


@pytest.mark.parametrize("name", CONFIGS)
def test_flex_attention_gives_what_dense_logits_give(name: str):
    config = CONFIGS[name]
    decoder, tokens = build(config, "fp64").eval(), tokens_of(config)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        attention, products = first_attention(decoder, tokens)
        positions = positions_of(config, decoder.dtypes, tokens, "flex")
        found = attention(products, positions)
        query, key = attention.queries_and_keys(products, positions)
        value = products[1].unflatten(-1, (-1, attention.d_head)).transpose(1, 2)
        value = value.repeat_interleave(4 // value.shape[1], dim=1)
        weights = weights_of(attention, query, key, reference(decoder, tokens))
        if config.axes.shaping.combines:
            centre = weights_of(attention, torch.zeros_like(query), key, reference(decoder, tokens))
            weights = torch.eye(tokens.shape[1], dtype=torch.float64) + weights - centre
        mixed = (weights @ value).transpose(1, 2).flatten(-2)
        if config.axes.shaping.active:
            rows = config.axes.shaping.bias_and_scale(config, 1, tokens.shape[1])[1]
            mixed = mixed * torch.from_numpy(rows)[:, None]
        assert attention.output is not None
        torch.testing.assert_close(found, attention.output(mixed), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(attention(products, reference(decoder, tokens)), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["documents", "alibi", "capped alibi documents", "sink", "sink alibi documents", "shaped documents"]
)
def test_gradients_of_flex_attention_are_those_of_dense_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    """torch refuses them on the CPU at its front door; the operator behind it has them."""
    from torch.nn.attention import flex_attention as front

    monkeypatch.setattr(front, "_validate_device", lambda query, key, value: None)
    config = CONFIGS[name]
    decoder, tokens = build(config, "fp64"), tokens_of(config)
    attention, products = first_attention(decoder, tokens)
    draw = torch.randn(2, tokens.shape[1], 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    inputs = [*products, *attention.added_parameters().values()]
    with torch.compiler.set_stance("force_eager"):
        found, wanted = (
            torch.autograd.grad(attention(products, positions), inputs, draw, retain_graph=True)
            for positions in (positions_of(config, decoder.dtypes, tokens, "flex"), reference(decoder, tokens))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "documents": ("varlen", "flex"),
    "learned documents": ("varlen", "flex"),
    "alibi": ("flex",),
    "capped alibi documents": ("flex",),
    "e_spa": ("flex",),
    "sink": ("sdpa", "flex"),
    "sink alibi documents": ("flex", "dense"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_layers_are_measured_with_the_same_logits_whatever_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch):
    config = CONFIGS[name]
    decoder, tokens = build(config, "fp64"), tokens_of(config, 12)
    attention, products = first_attention(decoder, tokens)
    wanted = reference(decoder, tokens)
    query, key = attention.queries_and_keys(products, wanted)
    for at_once in (2**20, 150):
        monkeypatch.setattr("stablelm.observe.layer_hooks.LOGITS", at_once)
        figures = attention_figures(attention, products, wanted)
        for kernel in KERNELS[name]:
            positions = positions_of(config, decoder.dtypes, tokens, kernel)
            torch.testing.assert_close(
                attention.logits(query, key, positions), attention.logits(query, key, wanted), rtol=1e-12, atol=1e-12
            )
            torch.testing.assert_close(attention_figures(attention, products, positions), figures)


def test_compiled_layers_with_flex_attention_share_one_graph_over_batches():
    graphs: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    config = CONFIGS["capped alibi documents"]
    decoder = build(config, "fp64").eval()
    for layer in decoder.layers:
        layer.compile(backend=backend, fullgraph=True)
    with torch.no_grad():
        for shift in range(3):
            tokens = tokens_of(config).roll(shift, dims=1)
            positions = positions_of(config, decoder.dtypes, tokens, "flex")
            x = decoder.stream.start(decoder.embed(tokens))
            for layer in decoder.layers:
                x = decoder.stream.join(x, layer(x, positions))
            with torch.compiler.set_stance("force_eager"):
                torch.testing.assert_close(decoder.finish(x), decoder(tokens), rtol=1e-10, atol=1e-10)
    assert len(graphs) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["documents", "alibi", "e_spa"])
def test_on_the_cpu_a_layer_keeps_neither_weights_nor_a_mask_of_its_own(name: str, precision: str):
    seq_len = 1024
    decoder = build(replace(CONFIGS[name], max_seq_len=seq_len), precision)
    tokens = tokens_of(decoder.config, seq_len)
    attention, products = first_attention(decoder, tokens)
    positions = decoder.positions(tokens)
    first, second = ({}, {})
    outputs = []
    for kept in (first, second):

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs.append(attention(products, positions))
    own = [second[at].untyped_storage().nbytes() for at in second.keys() - first.keys()]
    assert own
    assert max(own) < seq_len**2 * decoder.dtypes.compute.itemsize
    outputs[1].sum().backward()
