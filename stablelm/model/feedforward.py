"""The feed-forward body: two matrices, or three for swiglu."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.espa import tailored_slope
from stablelm.methods.placement import make_placement
from stablelm.methods.widths import Widths
from stablelm.model.linear import Dtypes, Linear
from stablelm.model.norms import Norm
from stablelm.model.positions import Positions


class FeedForward(nn.Module):
    """fc2(act(fc1 x)) with relu, exact (erf) gelu or a tailored leaky relu, or fc2(silu(gate x) * fc1 x) for swiglu.

    swiglu: Shazeer 2020; tailored: Zhang et al., ICLR 2022, a leaky relu times sqrt(2 / (1 + slope^2)).
    `first_maps` project what the sub-layer reads; `forward` goes on from their products.
    """

    def __init__(self, config: ModelConfig, dtypes: Dtypes, width: Widths):
        super().__init__()
        assert config.d_ff is not None
        self.activation = config.activation
        self.slope = tailored_slope(config.n_layers) if config.activation == "tailored" else 0.0
        bias, sigma = bool(config.bias), config.reparam == "sigma" and config.sigma.targets == "all"
        self.fc1 = Linear(width.read, config.d_ff, bias=bias, dtypes=dtypes, sigma=sigma)
        if config.activation == "swiglu":
            self.gate = Linear(width.read, config.d_ff, bias=bias, dtypes=dtypes, sigma=sigma)
        self.norm_inner = Norm(config, dtypes, config.d_ff) if make_placement(config).before_output else None
        self.fc2 = Linear(config.d_ff, width.branch, bias=bias, dtypes=dtypes, sigma=sigma)

    @property
    def first_maps(self) -> tuple[Linear, ...]:
        return (self.fc1, self.gate) if self.activation == "swiglu" else (self.fc1,)

    def forward(self, products: tuple[Tensor, ...], positions: Positions = ()) -> Tensor:
        """products: (batch, seq, d_ff) each -> (batch, seq, branch); `positions`: every body is called alike."""
        hidden = products[0]
        if self.activation == "swiglu":
            hidden = F.silu(products[1]) * hidden
        elif self.activation == "gelu":
            hidden = F.gelu(hidden)
        elif self.activation == "tailored":
            hidden = F.leaky_relu(hidden, self.slope) * math.sqrt(2 / (1 + self.slope**2))
        else:
            hidden = F.relu(hidden)
        if self.norm_inner is not None:
            hidden = self.norm_inner(hidden)
        return self.fc2(hidden)
