"""The code that methods add to a training step of pre_ln, in pieces that run alone (for `methods.py`)."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods.concatenation import Concatenation
from stablelm.model.added_parameters import named_parameters_of
from stablelm.model.attention.body import Attention
from stablelm.model.feedforward import FeedForward
from stablelm.model.linear import Linear
from stablelm.model.products import Vectors, one_matrix
from stablelm.model.sublayer import Chunks, Sublayer

Work = Callable[[], None]
M = TypeVar("M", bound=nn.Module)


class Shape(NamedTuple):
    n_layers: int
    d_model: int
    batch: int
    seq_len: int

    def __str__(self) -> str:
        return "x".join(str(size) for size in self)


class Added(NamedTuple):
    """Code that a method adds, and what pre_ln does in its place (None: nothing)."""

    name: str
    work: Work
    instead_of: Work | None = None


def added_code(engines: dict[str, TorchEngine], shape: Shape) -> list[Added]:
    """Pieces of a step, forward and backward, by method; `engines` holds pre_ln and the four that are named here."""
    sigma, base = engines["sigma_reparam"], engines["pre_ln"]
    return [
        Added("deepscalelm_pre: scales", writes(engines["deepscalelm_pre"], shape), writes(base, shape)),
        Added("magneto: inner norms", inner_norms(engines["magneto"], shape)),
        Added("sigma_reparam: scales", sigma_scales(sigma, shape)),
        Added("sigma_reparam: refresh", refreshes(sigma)),
        Added("catformer: stream to first products", reads(engines["catformer"], shape), reads(base, shape)),
    ]


def refreshes(engine: TorchEngine) -> Work:
    """What follows an optimizer step that was not skipped."""
    skipped = torch.tensor(False)

    def work() -> None:
        engine.matrices.update(skipped)

    return work


def writes(engine: TorchEngine, shape: Shape) -> Work:
    """Every sub-layer's sum onto the stream, forward and backward."""
    parts = _parts(engine, Sublayer)
    start = _features(engine, shape, shape.d_model, torch.float32)
    branches = [_features(engine, shape, shape.d_model, part.compute_dtype) for part in parts]
    gradient = torch.randn_like(start)

    def work() -> None:
        chunks: Chunks = (start,)
        for part, branch in zip(parts, branches, strict=True):
            chunks = part.stream.join(chunks, part.stream.write(chunks, branch, named_parameters_of(part, part.added)))
        chunks[0].backward(gradient)
        _forget(start, *branches)

    return work


def _last_map(body: Attention | FeedForward) -> Linear:
    last = body.output if isinstance(body, Attention) else body.fc2
    assert last is not None
    return last


def inner_norms(engine: TorchEngine, shape: Shape) -> Work:
    """The norms before the last matrices, with the casts around them, forward and backward."""
    bodies = [*_parts(engine, Attention), *_parts(engine, FeedForward)]
    norms = [(body.norm_inner, _last_map(body)) for body in bodies]
    inputs = {out.weight.shape[1]: _features(engine, shape, out.weight.shape[1], out.compute_dtype) for _, out in norms}
    gradients = {width: torch.randn_like(x) for width, x in inputs.items()}

    def work() -> None:
        for norm, output in norms:
            assert norm is not None
            width = output.weight.shape[1]
            norm(inputs[width]).to(output.compute_dtype).backward(gradients[width])
        _forget(*engine.parameters().values(), *inputs.values())

    return work


def sigma_scales(engine: TorchEngine, shape: Shape) -> Work:
    """gamma / sigma of every matrix and the cast of what it multiplies, forward and backward.

    The gradient is added to one that is there. Plain maps need the cast alone.
    """
    maps = [part for part in _parts(engine, Linear) if part.reparam is not None]
    gradients = {part.weight.shape: torch.randn_like(part.weight, dtype=part.compute_dtype) for part in maps}
    held = [torch.zeros_like(part.weight) for part in maps]

    def work() -> None:
        for part, gradient in zip(maps, held, strict=True):
            part.weight.grad = gradient
            matrix = one_matrix([part.weight], [part.gamma], [Vectors(part.sigma, part.v, part.u)], part.compute_dtype)
            matrix.backward(gradients[part.weight.shape])
        _forget(*engine.parameters().values())

    return work


def reads(engine: TorchEngine, shape: Shape) -> Work:
    """What every sub-layer does up to its first products, forward and backward, and writes to a stream that grows."""
    parts, x = _parts(engine, Sublayer), _features(engine, shape, shape.d_model, torch.float32)
    branches = [_features(engine, shape, len(_last_map(part.body).weight), part.compute_dtype) for part in parts]
    width = x.shape[-1] + sum(branch.shape[-1] for branch in branches)
    grows, noise = parts[0].stream.grows, dict[tuple[int, ...], Tensor]()

    def work() -> None:
        chunks, made = (Concatenation.start(x, width, parts[0].compute_dtype) if grows else (x,)), list[Tensor]()
        for part, branch in zip(parts, branches, strict=True):
            chunks, products = part.enter(chunks)
            made += products
            if grows:
                chunks = part.stream.join(chunks, part.stream.write(chunks, branch, {}))
        for product in made:
            noise.setdefault(tuple(product.shape), torch.randn_like(product))
        torch.autograd.backward(made, [noise[tuple(product.shape)] for product in made])
        _forget(*engine.parameters().values(), x, *branches)

    return work


def _parts(engine: TorchEngine, kind: type[M]) -> list[M]:
    return [part for part in engine.module.modules() if isinstance(part, kind)]


def _features(engine: TorchEngine, shape: Shape, width: int, dtype: torch.dtype) -> Tensor:
    """A random (batch, seq, width) that gets a gradient."""
    x = torch.randn(shape.batch, shape.seq_len, width, device=engine.device).to(dtype)
    return x.requires_grad_()


def _forget(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None
