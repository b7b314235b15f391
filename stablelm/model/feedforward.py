"""The feed-forward body: two matrices, or three with a gate."""

from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Widths
from stablelm.model.added_parameters import add_parameters, named_parameters_of
from stablelm.model.attention.cache import LayerCache
from stablelm.model.attention.positions import Positions
from stablelm.model.linear import Dtypes, Linear, reparam_of
from stablelm.model.norms import Norm


class FeedForward(nn.Module):
    """fc2(act(fc1 x)), or with a gated activation fc2(act(gate x) * fc1 x).

    `first_maps` project what the sub-layer reads; `forward` continues from their products.
    """

    passes_input = False

    def __init__(self, config: ModelConfig, dtypes: Dtypes, width: Widths, index: int):
        super().__init__()
        assert config.d_ff is not None
        self.activation, self.gains = config.axes.activation, config.axes.gains.at(config)
        bias, reparam = bool(config.bias), reparam_of(config, index)
        self.fc1 = Linear(width.read, config.d_ff, bias=bias, dtypes=dtypes, reparam=reparam)
        if self.activation.gated:
            self.gate = Linear(width.read, config.d_ff, bias=bias, dtypes=dtypes, reparam=reparam)
        placement = config.axes.placement.at(config, index)
        self.norm_inner = Norm(config, dtypes, config.d_ff) if placement.before_output else None
        self.fc2 = Linear(config.d_ff, width.branch, bias=bias, dtypes=dtypes, reparam=reparam)
        self.added = add_parameters(self, self.gains.in_body(config, index), dtypes)

    @property
    def first_maps(self) -> tuple[Linear, ...]:
        return (self.fc1, self.gate) if self.activation.gated else (self.fc1,)

    @property
    def first_widths(self) -> list[int]:
        return [len(linear.weight) for linear in self.first_maps]

    def forward(
        self, products: tuple[Tensor, ...], positions: Positions | None = None, *, cache: LayerCache | None = None
    ) -> Tensor:
        """products: (batch, seq, d_ff) each -> (batch, seq, branch); every body is called with the same arguments."""
        hidden, gate = products[0], products[1] if self.activation.gated else None
        if self.added:
            hidden, gate = self.gains.hidden(hidden, gate, named_parameters_of(self, self.added))
        hidden = self.activation.apply(hidden, gate)
        if self.norm_inner is not None:
            hidden = self.norm_inner(hidden)
        return self.fc2(hidden)
