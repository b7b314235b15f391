"""The code that methods add to a training step of pre_ln, in pieces that run alone (for `methods.py`)."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablelm.engine.torch_engine import TorchEngine
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
        Added("catformer: cat, norm, recompute", reads(engines["catformer"], shape), reads(base, shape)),
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
    """What every sub-layer does before its first product, forward and backward, recompute included."""
    chunks: Chunks = (_features(engine, shape, shape.d_model, torch.float32),)
    jobs: list[tuple[Sublayer, Chunks]] = []
    for part in _parts(engine, Sublayer):
        jobs.append((part, chunks))
        if part.frees_input:
            last = _last_map(part.body)
            chunks = (*chunks, _features(engine, shape, len(last.weight), torch.float32))
    largest = max(factor.numel() for part, read in jobs for factor in _factors(part, *read))
    noise = torch.randn(largest, device=engine.device).to(jobs[0][0].compute_dtype)

    def work() -> None:
        for part, read in jobs:
            if part.frees_input:
                factors = checkpoint(_factors, part, *read, use_reentrant=False, preserve_rng_state=False)
            else:
                factors = _factors(part, *read)
            torch.autograd.backward(factors, [noise[: factor.numel()].view_as(factor) for factor in factors])
        _forget(*engine.parameters().values(), *chunks)

    return work


def _factors(part: Sublayer, *chunks: Tensor) -> tuple[Tensor, ...]:
    """The input of a sub-layer's first product and, where they are made for it, its matrices."""
    x = part.stream.read(chunks, named_parameters_of(part, part.added))
    x = x if part.norm_in is None else part.norm_in(x)
    weights = [linear.first.weight for linear in part.body.first_maps]
    if part.frees_input:
        return x.to(part.compute_dtype), torch.cat([*weights]).to(part.compute_dtype)
    made = [weight.to(part.compute_dtype) for weight in weights if weight.dtype != part.compute_dtype]
    return x.to(part.compute_dtype), *made


def _parts(engine: TorchEngine, kind: type[M]) -> list[M]:
    return [part for part in engine.module.modules() if isinstance(part, kind)]


def _features(engine: TorchEngine, shape: Shape, width: int, dtype: torch.dtype) -> Tensor:
    """A random (batch, seq, width) that gets a gradient."""
    x = torch.randn(shape.batch, shape.seq_len, width, device=engine.device).to(dtype)
    return x.requires_grad_()


def _forget(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad = None
