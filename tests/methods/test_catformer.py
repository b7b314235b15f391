"""Catformer: its shape and parameters, its equations, what it does at the start, and the memory it keeps."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import ModelConfig
from stablelm.methods.catformer import CatformerOptions, Concat
from stablelm.methods.concatenation import Concatenation
from stablelm.methods.sizes import parameter_counts, stream_width, widths
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise, roles
from stablelm.model.linear import Linear
from stablelm.model.memory.memory_tracker import MemoryTracker
from stablelm.model.norms import Norm
from stablelm.model.sublayer import Sublayer
from stablelm.private_names import TorchDispatchMode

SHAPES = [(12, 128, 4), (24, 512, 8), (96, 64, 2), (192, 256, 4), (1000, 64, 2)]
SMALL = ("model.n_layers=3", "model.d_model=32", "model.n_heads=2", "model.attention.position=none")
WIDTHS = ("model.catformer.growth=12", "model.catformer.d_attention=24", "model.d_ff=40")


def _config(*overrides: str, pieces: int = 200, method: str = "catformer") -> ModelConfig:
    config = load([], [f"model.method={method}", "train.steps=5", "data.seq_len=64", *overrides]).config
    return resolve(config, pieces=pieces, world_size=1, accelerate_precision=None).model


def _shape(n_layers: int, d_model: int, n_heads: int) -> tuple[str, ...]:
    return f"model.n_layers={n_layers}", f"model.d_model={d_model}", f"model.n_heads={n_heads}"


def _decoder(config: ModelConfig, precision: str = "fp32", seed: int = 0) -> Decoder:
    decoder = Decoder(config, precision)
    initialise(decoder, config, seed)
    return decoder


def _tokens(batch: int, seq_len: int, seed: int = 0) -> Tensor:
    return torch.randint(200, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


# Shape and parameters.


def _body(config: ModelConfig) -> int:
    """Parameters but the embeddings and the head, of a model that is built."""
    with torch.device("meta"):
        decoder = Decoder(config, "fp32")
    sizes = {name: parameter.numel() for name, parameter in decoder.named_parameters()}
    assert parameter_counts(config)["total"] == sum(sizes.values())
    return sum(n for name, n in sizes.items() if not name.startswith(("embedding.", "position.", "head.")))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameters_are_those_of_the_residual_twin_within_one_percent(shape):
    ours, twin = (_config(*_shape(*shape), pieces=32000, method=method) for method in ("catformer", "pre_ln"))
    ratio = _body(ours) / _body(twin)
    assert ratio == pytest.approx(1, abs=0.01)
    options = ours.option(CatformerOptions)
    assert options.d_attention is not None and options.growth is not None
    assert options.d_attention / options.growth == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        ("model.activation=swiglu",),
        ("model.kv_heads=1",),
        ("model.bias=true", "model.attention.position=learned"),
        ("model.placement=sub", "model.norm=dyt"),
        ("model.reparam=sigma", "model.placement=peri"),
        ("model.catformer.attention_expansion=1", "model.catformer.feedforward_expansion=4"),
        ("model.catformer.growth=20",),
        ("model.catformer.d_attention=64",),
    ],
    ids=lambda options: " ".join(options),
)
def test_the_twin_differs_in_the_stream_alone(options, tied):
    overrides = (*_shape(12, 128, 4), *options, f"model.tie_embeddings={tied}")
    twin = _body(_config(*(option for option in overrides if "catformer" not in option), "model.stream=residual"))
    assert _body(_config(*overrides)) == pytest.approx(twin, rel=0.01)


def test_what_is_set_is_kept():
    model = _config(*_shape(12, 128, 4), *WIDTHS)
    options = model.option(CatformerOptions)
    assert (options.growth, options.d_attention, model.d_ff) == (12, 24, 40)
    assert abs(_body(model) / _body(_config(*_shape(12, 128, 4), method="pre_ln")) - 1) > 0.1


def test_widths_and_parameters_in_closed_form():
    """D_t = d + t g; matrices 3 a (N d + g N (N - 1)) + a g N + h (N d + g N^2) + h g N, a norm for each reading."""
    n, d, g, a, h = 3, 32, 12, 24, 40
    config = _config(*SMALL, *WIDTHS)
    assert [widths(config, t).read for t in range(2 * n)] == [32, 44, 56, 68, 80, 92]
    assert stream_width(config, n) == d + 2 * n * g == 104
    matrices = 3 * a * (n * d + g * n * (n - 1)) + a * g * n + h * (n * d + g * n * n) + h * g * n
    norms = sum(d + t * g for t in range(2 * n + 1))
    counts = parameter_counts(config)
    assert counts["layers"] == matrices + norms - 104
    assert _body(config) == matrices + norms + 104 * d
    assert [linear.weight.shape[1] for linear in _first_maps(_decoder(config))] == [32, 44, 56, 68, 80, 92]


def _first_maps(decoder: Decoder) -> list[Linear]:
    bodies = (part.body for part in decoder.modules() if isinstance(part, Sublayer))
    return [linear for body in bodies for linear in body.first_maps[:1] if isinstance(linear, Linear)]


def test_a_published_ratio():
    """N 12, d 768, g 256, expansions 1 and 4: 0.991 of 12 d^2 N."""
    widths_ = ("model.catformer.growth=256", "model.catformer.d_attention=256", "model.d_ff=1024")
    config = _config(*_shape(12, 768, 4), *widths_)
    with torch.device("meta"):
        layers = Decoder(config, "fp32").layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.ndim == 2)
    assert matrices / (12 * 768**2 * 12) == pytest.approx(0.991, abs=5e-4)
    assert stream_width(config, 12) == 6912


# The equations, without a concatenation.


def _norm_linear(sources: list[Tensor], w: dict[str, Tensor], norm: str, names: list[str]) -> list[Tensor]:
    """Linear maps of LN([x_1; ...; x_t]) from sums over each x_i and a product with each x_i alone."""
    total = sum(x.shape[-1] for x in sources)
    mean = torch.stack([x.sum(-1) for x in sources]).sum(0)[..., None] / total
    variance = torch.stack([x.square().sum(-1) for x in sources]).sum(0)[..., None] / total - mean**2
    results = []
    for name in names:
        weight = w[f"{name}.weight"] * w[f"{norm}.weight"]
        parts = weight.split([x.shape[-1] for x in sources], dim=1)
        product = torch.stack([x @ part.T for x, part in zip(sources, parts, strict=True)]).sum(0)
        y = (product - mean * weight.sum(dim=1)) / (variance + 1e-5).sqrt()
        if f"{norm}.bias" in w:
            y = y + w[f"{name}.weight"] @ w[f"{norm}.bias"]
        results.append(y + w.get(f"{name}.bias", 0.0))
    return results


def _plain_hidden(w: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """(batch, seq) -> what the head multiplies: h_t = f_t(LN([h_0; ...; h_(t-1)])), then W LN of all."""
    sources = [w["embedding.weight"][tokens]]
    heads, after = config.n_heads, torch.ones(tokens.shape[1], tokens.shape[1]).triu(1) > 0
    for layer in range(config.n_layers):
        at = f"layers.{layer}.attention."
        names = [f"{at}body.{kind}" for kind in ("query", "key", "value")]
        q, k, v = (
            y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in _norm_linear(sources, w, f"{at}norm_in", names)
        )
        logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(after, -math.inf)
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        sources.append(mixed @ w[f"{at}body.output.weight"].T + w.get(f"{at}body.output.bias", 0.0))
        at = f"layers.{layer}.feedforward."
        (hidden,) = _norm_linear(sources, w, f"{at}norm_in", [f"{at}body.fc1"])
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        sources.append(hidden @ w[f"{at}body.fc2.weight"].T + w.get(f"{at}body.fc2.bias", 0.0))
    return _norm_linear(sources, w, "norm_final", ["projection"])[0]


def _off_centre(decoder: Decoder) -> None:
    """Moves gains and biases off 1 and 0, so that they matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5)])
@pytest.mark.parametrize(("n_layers", "bias"), [(3, False), (3, True), (9, False)])
def test_the_decoder_equals_the_equations_without_a_concatenation(n_layers, bias, precision, tolerance):
    config = _config(*SMALL, *WIDTHS, f"model.bias={bias}", f"model.n_layers={n_layers}")
    decoder = _decoder(config, precision)
    _off_centre(decoder)
    w = {name: parameter.detach().clone().requires_grad_() for name, parameter in decoder.named_parameters()}
    found, wanted = decoder(_tokens(2, 9)), _plain_hidden(w, config, _tokens(2, 9))
    assert found.shape == (2, 9, 32)
    assert (found - wanted).norm() <= tolerance * wanted.norm()
    back = torch.randn(found.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(found.dtype)
    found.backward(back)
    wanted.backward(back)
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if name != "head.weight"}
    # The gradient of a key's bias is zero but for rounding.
    floor = 0.01 * max(w[name].grad.norm() for name in gradients)  # type: ignore[union-attr]
    for name, gradient in gradients.items():
        plain = w[name].grad
        assert gradient is not None and plain is not None, name
        assert (gradient - plain).norm() <= tolerance * max(plain.norm(), floor), name


BUFFER, FREED, KEPT = "one buffer", "put together again in the backward pass", "kept whole at every depth"


def _read_as(form: str, decoder: Decoder) -> Decoder:
    """The decoder, which holds its stream in one of three forms while it is trained."""
    if form != BUFFER:
        decoder.tap = lambda _, chunks: chunks
    for part in decoder.modules():
        if isinstance(part, Sublayer):
            part.frees_input = form != KEPT
    return decoder


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp64", 1e-12)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "settings",
    [
        ("model.method=catformer",),
        ("model.method=catformer", "model.norm=rmsnorm", "model.activation=swiglu", "model.bias=true"),
        ("model.method=catformer", "model.placement=peri", "model.attention.low_rank=0.25", "model.init=gpt2"),
        ("model.method=catformer_sigma", "model.attention.value_residual=true"),
    ],
    ids=str,
)
def test_every_form_of_the_stream_gives_the_same(settings, dropout, precision, tolerance):
    """Outputs and gradients; those put together again and those kept agree in outputs bit for bit."""
    settings = (*SMALL, *WIDTHS, f"model.dropout={dropout}", "model.attention.position=rope", *settings)
    decoders = {form: _read_as(form, _decoder(_config(*settings), precision)) for form in (BUFFER, FREED, KEPT)}
    outputs = {}
    for form, decoder in decoders.items():
        _off_centre(decoder)
        torch.manual_seed(11)
        outputs[form] = decoder(_tokens(2, 9))
        outputs[form].square().sum().backward()
    assert torch.equal(outputs[FREED], outputs[KEPT])
    assert (outputs[BUFFER] - outputs[KEPT]).norm() <= tolerance * outputs[KEPT].norm()
    found = {form: _gradients(decoder) for form, decoder in decoders.items()}
    largest = max(gradient.norm() for gradient in found[KEPT].values())
    for name, wanted in found[KEPT].items():
        for form in (BUFFER, FREED):
            error = (found[form][name] - wanted).norm()
            assert error <= tolerance * max(wanted.norm(), 0.01 * largest), (form, name)


def _gradients(decoder: Decoder) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in decoder.named_parameters() if name != "head.weight"}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize("settings", [("model.norm=dyt",), ("model.placement=none",)], ids=str)
def test_a_norm_that_no_product_can_take_in_reads_the_parts(settings):
    config = _config(*SMALL, *WIDTHS, *settings)
    found, wanted = (_read_as(form, _decoder(config, "fp64"))(_tokens(2, 9)) for form in (BUFFER, KEPT))
    assert torch.equal(found, wanted)
    found.sum().backward()


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[tuple[int, ...]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.add((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_a_deep_model_multiplies_in_few_shapes():
    """Libraries prepare each shape anew and forget all but some: a step took 1.7 times as long with 1,500 of them."""
    growth = ("model.catformer.growth=13", "model.catformer.d_attention=28", "model.d_ff=30")
    decoder = _decoder(_config(*_shape(96, 64, 2), *growth))
    with _Products() as products:
        decoder(_tokens(1, 8)).sum().backward()
    assert len(products.shapes) < 2 * 3 * 32 + 20
    stream = Concatenation.start(torch.zeros(1, 8, 64), 64 + 192 * 13, torch.float32)
    read, needed = 0, 0
    for _ in range(192):
        assert stream.read_width >= stream.stream.shape[-1]
        read, needed = read + stream.read_width, needed + stream.stream.shape[-1]
        stream = stream.append(torch.zeros(1, 8, 13))
    assert read / needed < 1.05


# Memory.


def _kept_bytes(n_layers: int, form: str) -> int:
    """Bytes of distinct storages, parameters left out, that autograd and the stream hold before a backward pass."""
    growth = ("model.catformer.growth=16", "model.catformer.d_attention=16", "model.d_ff=32")
    decoder = _read_as(form, _decoder(_config(*_shape(n_layers, 64, 2), *growth)))
    tokens = _tokens(2, 64)
    with MemoryTracker() as tracker:
        tracker.assign((*decoder.parameters(), *decoder.buffers(), tokens), "weights")
        held = sum(tracker.current.values())
        out = decoder(tokens)
        held = sum(tracker.current.values()) - held
    out.sum().backward()
    return held


def test_a_settled_stream_is_the_same_in_few_tensors():
    chunks = tuple(torch.randn(2, 3, width) for width in (8, *[3] * 300))
    settled = chunks[:1]
    for chunk in chunks[1:]:
        settled = Concat().settle((*settled, chunk))
    assert len(settled) < 3 * 16
    assert torch.equal(Concat().finish(settled), Concat().finish(chunks))


def test_kept_memory_grows_linearly_with_depth():
    once, twice = ({form: _kept_bytes(n, form) for form in (BUFFER, FREED, KEPT)} for n in (12, 24))
    assert twice[BUFFER] / once[BUFFER] < 2.1
    assert twice[FREED] / once[FREED] < 2.6
    assert twice[KEPT] / once[KEPT] > 3
    assert once[BUFFER] < once[FREED] < once[KEPT] / 2


# At the start.


def _branch_moments(config: ModelConfig, seeds: int = 3) -> Tensor:
    """Second moment of every branch, (2 n_layers,), a mean over seeds."""
    assert config.vocab_size is not None
    # As the theory has it: the share of a token is 1 / its rank.
    frequencies = (1 / torch.arange(1, config.vocab_size + 1)).expand(4, -1)
    found = []
    for seed in range(seeds):
        decoder, last = _decoder(config, seed=seed), []
        decoder.tap = lambda _, chunks, last=last: (last.append(chunks), chunks)[1]
        with torch.no_grad():
            decoder(torch.multinomial(frequencies, 64, replacement=True, generator=torch.Generator().manual_seed(seed)))
        branches = torch.cat(last[-1], dim=-1)[..., config.d_model :].unflatten(-1, (2 * config.n_layers, -1))
        found.append(branches.square().mean(dim=(0, 1, 3)))
    assert found[0].shape == (2 * config.n_layers,)
    return torch.stack(found).mean(dim=0)


START = (*_shape(8, 256, 4), "model.catformer.growth=64", "model.catformer.d_attention=256", "model.d_ff=512")


@pytest.mark.parametrize(("activation", "moment"), [("relu", 0.5), ("gelu", 0.425)])
def test_fan_in_gives_feedforward_branches_the_same_size_at_any_depth(activation, moment):
    config = _config(*START, "model.init=fan_in", f"model.activation={activation}")
    found = _branch_moments(config)[1::2]
    assert found.tolist() == pytest.approx([moment] * 8, rel=0.1)
    assert (found[-1] / found[0]).item() == pytest.approx(1, abs=0.15)


def test_an_inner_norm_gives_unit_branches_of_both_kinds():
    found = _branch_moments(_config(*START, "model.init=fan_in", "model.placement=sub"))
    assert found.tolist() == pytest.approx([1] * 16, rel=0.1)


def test_the_method_solves_for_unit_branches_of_both_kinds():
    found = _branch_moments(_config(*START))
    assert found[1::2].tolist() == pytest.approx([1] * 8, rel=0.1)
    assert found[::2].mean().item() == pytest.approx(1, abs=0.15)
    assert found[::2].tolist() == pytest.approx([1] * 8, abs=0.3)


def test_there_is_a_norm_for_every_reading_and_no_other_part():
    config = replace(_config(*SMALL, *WIDTHS), norm="rmsnorm")
    decoder = _decoder(config)
    names = {role.kind for role in roles(decoder).values()}
    assert names == {"embedding", "head", "projection", "query", "key", "value", "output", "fc1", "fc2", "norm_gain"}
    norms = [part.weight for part in decoder.modules() if isinstance(part, Norm)]
    sizes = [gain.numel() for gain in norms if gain is not None]
    assert sorted(sizes) == [32, 44, 56, 68, 80, 92, 104]
