"""The stream axis: what flows from layer to layer and how a branch joins it.

The stream is a tuple of tensors, each (batch, seq, width), and is never mutated, so that recompute and
sharding engines may run any layer again from its inputs.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.scales import skip_and_branch

Chunks = tuple[Tensor, ...]
MERGED = 16


class Stream(Protocol):
    """How the stream starts, is read, grows and ends.

    A layer returns only tensors that it made itself (engines hook the outputs of a layer); `join` turns
    the stream before it and these into the stream after it, and is associative.
    """

    def start(self, embedded: Tensor) -> Chunks:
        """The stream that holds the embeddings alone."""
        ...

    def read(self, chunks: Chunks) -> Tensor:
        """The input of a sub-layer, before any norm."""
        ...

    def write(self, chunks: Chunks, branch: Tensor) -> Chunks:
        """The new tensors that a sub-layer's branch makes of the stream."""
        ...

    def join(self, chunks: Chunks, new: Chunks) -> Chunks:
        """The stream after `new` was written onto `chunks`."""
        ...

    def settle(self, chunks: Chunks) -> Chunks:
        """The same stream in fewer tensors, between layers: reading hundreds of narrow ones takes longer."""
        ...

    def finish(self, chunks: Chunks) -> Tensor:
        """What the final norm and the head see."""
        ...


@dataclass(frozen=True)
class Sum:
    """skip x + branch f(x), one tensor; (1, 1) is the plain residual stream."""

    skip: float = 1.0
    branch: float = 1.0

    def start(self, embedded: Tensor) -> Chunks:
        return (embedded,)

    def read(self, chunks: Chunks) -> Tensor:
        return chunks[0]

    def write(self, chunks: Chunks, branch: Tensor) -> Chunks:
        x, branch = chunks[0], branch.to(chunks[0].dtype)
        if self.skip == 0:
            return (branch * self.branch,)
        return (torch.add(x if self.skip == 1 else x * self.skip, branch, alpha=self.branch),)

    def join(self, chunks: Chunks, new: Chunks) -> Chunks:
        return new

    def settle(self, chunks: Chunks) -> Chunks:
        return chunks

    def finish(self, chunks: Chunks) -> Tensor:
        return chunks[0]


@dataclass(frozen=True)
class Concat:
    """Catformer: all outputs so far side by side (Davis et al., ICML 2021); a sub-layer makes its own chunk only."""

    def start(self, embedded: Tensor) -> Chunks:
        return (embedded,)

    def read(self, chunks: Chunks) -> Tensor:
        return torch.cat(chunks, dim=-1)

    def write(self, chunks: Chunks, branch: Tensor) -> Chunks:
        return (branch.to(chunks[0].dtype),)

    def join(self, chunks: Chunks, new: Chunks) -> Chunks:
        return chunks + new

    def settle(self, chunks: Chunks) -> Chunks:
        while len(chunks) >= MERGED and len({chunk.shape[-1] for chunk in chunks[-MERGED:]}) == 1:
            chunks = (*chunks[:-MERGED], torch.cat(chunks[-MERGED:], dim=-1))
        return chunks

    def finish(self, chunks: Chunks) -> Tensor:
        return torch.cat(chunks, dim=-1)


@dataclass(frozen=True)
class Dense(Sum):
    """DenseFormer (Pagliardini et al., NeurIPS 2024): the stream, then the embedding and every layer's output.

    A layer ends by replacing the stream by a weighted sum of all outputs so far (`average`).
    """

    def start(self, embedded: Tensor) -> Chunks:
        return (embedded, embedded)

    def join(self, chunks: Chunks, new: Chunks) -> Chunks:
        return (new[0], *chunks[1:], *new[1:])

    def average(self, chunks: Chunks, output: Tensor, weights: Tensor) -> Chunks:
        """The stream after a layer, and the layer's output, which later averages read.

        `chunks`: the stream before the layer; `weights`: (outputs so far with this one,).
        """
        outputs = (*chunks[1:], output)
        total = torch.zeros_like(output)
        for weight, each in zip(weights.to(output.dtype).unbind(), outputs, strict=True):
            total = torch.addcmul(total, each, weight)
        return total, output


def make_stream(config: ModelConfig) -> Stream:
    """The stream of a resolved config."""
    assert config.stream is not None, "apply_method fills model.stream"
    if config.stream == "concat":
        return Concat()
    skip, branch = skip_and_branch(config)
    return Dense(skip, branch) if config.stream == "dense" else Sum(skip, branch)
