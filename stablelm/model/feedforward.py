"""The feed-forward body: two matrices, or three for swiglu."""

import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.model.linear import Dtypes, Linear
from stablelm.model.positions import Rotation


class FeedForward(nn.Module):
    """fc2(act(fc1 x)) with relu or exact (erf) gelu, or fc2(silu(gate x) * fc1 x) for swiglu (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes):
        super().__init__()
        assert config.d_ff is not None
        self.activation = config.activation
        bias = bool(config.bias)
        self.fc1 = Linear(config.d_model, config.d_ff, bias=bias, dtypes=dtypes)
        if config.activation == "swiglu":
            self.gate = Linear(config.d_model, config.d_ff, bias=bias, dtypes=dtypes)
        self.fc2 = Linear(config.d_ff, config.d_model, bias=bias, dtypes=dtypes)

    def forward(self, x: Tensor, rotation: Rotation = ()) -> Tensor:
        """x: (batch, seq, d_model) -> the same shape; every body is called alike, so `rotation` is accepted."""
        hidden = self.fc1(x)  # (batch, seq, d_ff)
        if self.activation == "swiglu":
            hidden = F.silu(self.gate(x)) * hidden
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        else:
            hidden = F.relu(hidden)
        return self.fc2(hidden)
