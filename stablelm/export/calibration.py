"""How large the inputs of a model's norms are, measured on a few tokens with one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.export.weights import Weights
from stablelm.model.decoder import Decoder
from stablelm.model.linear import derive
from stablelm.private_names import saved_buffers


class NormInput(NamedTuple):
    """The mean square of what a norm reads, of layer norms the variance: its harmonic mean over tokens, and its least.

    The harmonic mean, because eps changes a norm's output by the share eps / (2 mean square).
    """

    mean: float
    least: float


@torch.no_grad()
def norm_inputs(model: ModelConfig, weights: Weights, tokens: Tensor) -> list[NormInput]:
    """What the norm of each sub-layer reads and, last, the final norm; tokens: (batch, seq) int64."""
    centred = model.axes.norm.standard == "layer"
    with torch.device("meta"):
        decoder = Decoder(model, "fp32").eval()
    outer = (decoder.embedding, decoder.scaling, decoder.position, decoder.norm_embedding)
    outer = [part for part in outer if part is not None]
    for part in outer:
        _load(part, decoder, weights)
    chunks = decoder.stream.start(decoder.embed(tokens))
    for part in outer:
        part.to_empty(device="meta")
    positions, found = decoder.positions(tokens), list[NormInput]()
    for layer in decoder.layers:
        _load(layer, decoder, weights)
        norms = [layer.attention.norm_in, layer.feedforward.norm_in]  # type: ignore[union-attr]
        with _recorded(norms, found, centred):  # type: ignore[arg-type]
            chunks = decoder.stream.join(chunks, layer(chunks, positions))
        layer.to_empty(device="meta")
    found.append(_of(decoder.stream.finish(chunks), centred))
    return found


def _load(part: nn.Module, decoder: Decoder, weights: Weights) -> None:
    prefix = next(name for name, module in decoder.named_modules() if module is part)
    part.to_empty(device="cpu")
    for name, tensor in (*part.named_parameters(), *saved_buffers(part).items()):
        tensor.data.copy_(weights.read(f"{prefix}.{name}"))
    derive(part)


@contextmanager
def _recorded(norms: list[nn.Module], found: list[NormInput], centred: bool) -> Iterator[None]:
    """Adds what each norm reads inside the with block."""
    handles = [
        norm.register_forward_pre_hook(lambda _, inputs: found.append(_of(inputs[0], centred))) for norm in norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of(x: Tensor, centred: bool) -> NormInput:
    x = x.double()
    squares = (x - x.mean(dim=-1, keepdim=True) if centred else x).pow(2).mean(dim=-1)
    return NormInput(1 / squares.reciprocal().mean().item(), squares.min().item())
