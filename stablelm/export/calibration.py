"""How large the inputs of a model's norms are, measured on a few tokens with one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.export.weights import Weights
from stablelm.model.decoder import Decoder


@torch.no_grad()
def norm_inputs(model: ModelConfig, weights: Weights, tokens: Tensor) -> list[float]:
    """The harmonic mean over tokens of the mean square that the norm of each sub-layer reads; last, the final norm's.

    tokens: (batch, seq) int64. The harmonic mean, because eps changes a norm's output by eps / (2 mean square) of it;
    of layer norms the variance in place of the mean square.
    """
    centred = model.axes.norm.standard == "layer"
    with torch.device("meta"):
        decoder = Decoder(model, "fp32").eval()
    outer = [part for part in (decoder.embedding, decoder.position, decoder.norm_embedding) if part is not None]
    for part in outer:
        _load(part, decoder, weights)
    chunks = decoder.stream.start(decoder.embed(tokens))
    for part in outer:
        part.to_empty(device="meta")
    positions, found = decoder.positions(tokens), []
    for layer in decoder.layers:
        _load(layer, decoder, weights)
        norms = [layer.attention.norm_in, layer.feedforward.norm_in]  # type: ignore[union-attr]
        with _recorded(norms, found, centred):  # type: ignore[arg-type]
            chunks = decoder.stream.join(chunks, layer(chunks, positions))
        layer.to_empty(device="meta")
    found.append(_harmonic(decoder.stream.finish(chunks), centred))
    return found


def _load(part: nn.Module, decoder: Decoder, weights: Weights) -> None:
    prefix = next(name for name, module in decoder.named_modules() if module is part)
    part.to_empty(device="cpu")
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        tensor.data.copy_(weights.read(f"{prefix}.{name}"))


@contextmanager
def _recorded(norms: list[nn.Module], found: list[float], centred: bool) -> Iterator[None]:
    """Adds what each norm reads inside the with block."""
    handles = [
        norm.register_forward_pre_hook(lambda _, inputs: found.append(_harmonic(inputs[0], centred))) for norm in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _harmonic(x: Tensor, centred: bool) -> float:
    x = x.double()
    x = x - x.mean(dim=-1, keepdim=True) if centred else x
    return 1 / x.pow(2).mean(dim=-1).reciprocal().mean().item()
