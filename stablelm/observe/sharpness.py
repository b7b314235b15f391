"""Sharpness: the largest eigenvalue of the loss's Hessian, by Lanczos on a fixed batch (Cohen et al., 2021, do so).

Products with the Hessian are central differences of gradients, because the loss, the kernels of attention and the
products of reparametrised matrices are differentiated once, and sharded engines give gradients alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import part_of
from stablelm.model.devices import to_device
from stablelm.observe.updates import counted, summed, weight_parts
from stablelm.seeds import seed_from

ITERATIONS = 16
"""Products with the Hessian, a fixed number, so that every engine finds the same: two passes each."""
STEPS = {torch.float32: 1e-3, torch.float64: 1e-4}
"""Length by which all weights together move either way, by the dtype of the weights."""
Vector = dict[str, Tensor]
"""This rank's parts by parameter name."""


def sharpness(engine: Engine, ranks: Ranks, tokens: Tensor, targets: Tensor) -> float:
    """Of the mean loss over (rows, seq) tokens without dropout, nats; the same on every rank; changes nothing.

    A Ritz value: at most the largest eigenvalue. Call on all ranks with the same tokens. Gradients are cleared.
    """
    with _at_rest(engine):
        space = _Space(engine, ranks)
        try:
            return _lanczos(space, lambda v: _hessian_product(space, v, tokens, targets))
        finally:
            space.restore()


@contextmanager
def _at_rest(engine: Engine) -> Iterator[None]:
    """Without dropout, layers uncompiled, and generators as they were."""
    was_training = engine.module.training
    engine.module.eval()
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        engine.clear_gradients()
        engine.module.train(was_training)


class _Space:
    """The weights as a vector, in the parts that ranks hold."""

    def __init__(self, engine: Engine, ranks: Ranks):
        self.engine, self.ranks = engine, ranks
        self._live = weight_parts(engine)
        self.start: Vector = {name: part.detach().clone() for name, part in self._live.items()}
        tensors = engine.tensors(optimizer=False)
        self._counted = counted({name: tensors[f"model.{name}"] for name in self._live}, ranks)
        self.step = STEPS[next(iter(self.start.values())).dtype]

    @torch.no_grad()
    def move(self, vector: Vector, length: float) -> None:
        """Puts the weights at their start plus length * vector; a collective."""
        for name, part in self._live.items():
            torch.add(self.start[name], vector[name].view_as(part), alpha=length, out=part)
        self.engine.loaded()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back, bit for bit; a collective."""
        for name, part in self._live.items():
            part.copy_(self.start[name])
        self.engine.loaded()

    def dot(self, one: Vector, other: Vector) -> float:
        """The product over all ranks, each element once; a collective."""
        own = [float((one[name].double() * other[name].double()).sum()) for name in one if name in self._counted]
        return float(summed(torch.tensor([math.fsum(own)], dtype=torch.float64), self.ranks))

    def random(self) -> Vector:
        """A direction that depends on the parameters' names alone, in this rank's parts."""
        tensors, found = self.engine.tensors(optimizer=False), {}
        for name, part in self._live.items():
            place = part_of(tensors[f"model.{name}"], 0, 1)
            generator = torch.Generator().manual_seed(seed_from("sharpness", name))
            whole = torch.randn(math.prod(place.shape), generator=generator)
            found[name] = whole[place.start : place.stop].to(part.device, part.dtype)
        return found


def _hessian_product(space: _Space, vector: Vector, tokens: Tensor, targets: Tensor) -> Vector:
    """H v for a vector of length 1."""
    gradients = []
    for sign in (1, -1):
        space.move(vector, sign * space.step)
        gradients.append(_gradient(space, tokens, targets))
    plus, minus = gradients
    return {name: (plus[name] - minus[name]) / (2 * space.step) for name in plus}


def _gradient(space: _Space, tokens: Tensor, targets: Tensor) -> Vector:
    """Of the mean loss, at the weights as they are."""
    engine = space.engine
    boundaries = engine.module.boundaries(tokens, engine.device)
    sums = engine.loss(to_device(tokens, engine.device), to_device(targets, engine.device), boundaries=boundaries)
    # The engine adds up over ranks, and all run the same rows.
    engine.backward(sums.total / (sums.valid * space.ranks.world_size), last=True)
    found = engine.gradient_shards()
    vector = {}
    for name, start in space.start.items():
        if name in found:
            vector[name] = (
                part_of(found[name], 0, 1).local.detach().reshape(-1).to(start.device, start.dtype, copy=True)
            )
        else:
            vector[name] = torch.zeros_like(start).reshape(-1)
    engine.clear_gradients()
    return vector


def _lanczos(space: _Space, product: Callable[[Vector], Vector]) -> float:
    """The largest eigenvalue of the tridiagonal matrix after `ITERATIONS` steps.

    Vectors are not made orthogonal again: rounding gives copies of eigenvalues, which leave the largest where it is.
    """
    current, before = space.random(), None
    length = math.sqrt(space.dot(current, current))
    current = {name: part / length for name, part in current.items()}
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(ITERATIONS):
        new = product(current)
        diagonal.append(space.dot(new, current))
        for name, part in new.items():
            part.sub_(current[name], alpha=diagonal[-1])
            if before is not None:
                part.sub_(before[name], alpha=beside[-1])
        length = math.sqrt(space.dot(new, new))
        if not length > 0:  # the space is exhausted, or the loss is not finite
            break
        beside.append(length)
        before, current = current, {name: part / length for name, part in new.items()}
    if not all(map(math.isfinite, (*diagonal, *beside))):
        return math.nan
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    sides = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix += torch.diag(sides, 1) + torch.diag(sides, -1)
    return float(torch.linalg.eigvalsh(matrix)[-1])
