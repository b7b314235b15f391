"""The only block code: norm by placement, body, dropout, write onto the stream."""

import torch.nn.functional as F
from torch import nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.placement import make_placement
from stablelm.methods.stream import Chunks, make_stream
from stablelm.model.attention import Attention
from stablelm.model.feedforward import FeedForward
from stablelm.model.linear import Dtypes
from stablelm.model.norms import Norm
from stablelm.model.positions import Rotation


class Sublayer(nn.Module):
    """One body (attention or feed-forward) with its norms and its way onto the stream."""

    def __init__(self, body: nn.Module, config: ModelConfig, dtypes: Dtypes):
        super().__init__()
        placement = make_placement(config)
        self.stream = make_stream(config)
        self.dropout = config.dropout
        self.compute_dtype = dtypes.compute
        self.body = body
        self.norm_in = Norm(config, dtypes) if placement.before_body else None
        self.norm_out = Norm(config, dtypes) if placement.after_write else None

    def forward(self, chunks: Chunks, rotation: Rotation) -> Chunks:
        """chunks: the stream, each (batch, seq, d) -> the tensors that this sub-layer adds, in the stream's dtype."""
        x = self.stream.read(chunks)
        if self.norm_in is not None:
            x = self.norm_in(x)
        branch = self.body(x.to(self.compute_dtype), rotation)
        branch = F.dropout(branch, self.dropout, self.training)
        new = self.stream.write(chunks, branch)
        if self.norm_out is not None:
            new = tuple(self.norm_out(chunk).to(chunk.dtype) for chunk in new)
        return new


class Layer(nn.Module):
    """An attention and a feed-forward sub-layer: the unit of recompute, compilation and sharding."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes):
        super().__init__()
        self.stream = make_stream(config)
        self.attention = Sublayer(Attention(config, dtypes), config, dtypes)
        self.feedforward = Sublayer(FeedForward(config, dtypes), config, dtypes)

    def forward(self, chunks: Chunks, rotation: Rotation) -> Chunks:
        """As Sublayer.forward: returns what both sub-layers add, for `Stream.join`."""
        attended = self.attention(chunks, rotation)
        return self.stream.join(attended, self.feedforward(self.stream.join(chunks, attended), rotation))
