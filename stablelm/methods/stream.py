"""The stream axis: what flows from layer to layer and how a branch joins it.

The stream is a tuple of tensors, each (batch, seq, width), and is never mutated, so that recompute and
sharding engines may run any layer again from its inputs.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stablelm.config.schema import ModelConfig

Chunks = tuple[Tensor, ...]


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

    def finish(self, chunks: Chunks) -> Tensor:
        """What the final norm and the head see."""
        ...


@dataclass(frozen=True)
class Residual:
    """x + f(x), one tensor."""

    def start(self, embedded: Tensor) -> Chunks:
        return (embedded,)

    def read(self, chunks: Chunks) -> Tensor:
        return chunks[0]

    def write(self, chunks: Chunks, branch: Tensor) -> Chunks:
        x = chunks[0]
        return (x + branch.to(x.dtype),)

    def join(self, chunks: Chunks, new: Chunks) -> Chunks:
        return new

    def finish(self, chunks: Chunks) -> Tensor:
        return chunks[0]


_STREAMS = {"residual": Residual}


def make_stream(config: ModelConfig) -> Stream:
    """The stream of a resolved config."""
    assert config.stream is not None, "apply_method fills model.stream"
    return _STREAMS[config.stream]()
