"""What every attention body needs of the positions and documents, made once for all layers."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.sizes import d_head
from stablelm.model.attention import attention_kernels, documents
from stablelm.model.attention.attention_kernels import Kernel
from stablelm.model.linear import Dtypes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Positions(NamedTuple):
    """What the chosen kernel takes is set, the rest None: `boundaries` for `varlen`, `blocks` for `flex`."""

    tables: tuple[Tensor, ...] = ()
    """What turns queries and keys."""
    bias: Tensor | None = None
    """Added to the logits, with the causal mask in it: (batch or 1, heads or 1, queries, keys)."""
    slopes: Tensor | None = None
    """(heads,): what each head subtracts from a logit for each token between key and query."""
    numbers: Tensor | None = None
    """(batch, seq) int32: the document of each token, which attention does not leave."""
    boundaries: Tensor | None = None
    """int32, of `documents.boundaries`."""
    blocks: "BlockMask | None" = None

    @property
    def is_causal(self) -> bool:
        """Whether nothing is added to the logits but the causal mask."""
        return self.bias is None and self.slopes is None and self.numbers is None

    def dense_bias(self, seq_len: int, dtype: torch.dtype) -> Tensor | None:
        """`bias` with slopes and documents in it; None where nothing is added but the causal mask."""
        bias = self.bias
        if self.slopes is not None:
            place = torch.arange(seq_len, device=self.slopes.device)
            distance = place - place[:, None]
            bias = (self.slopes[:, None, None] * distance).masked_fill_(distance > 0, -torch.inf)[None]
        if self.numbers is None:
            return bias
        within = documents.bias(self.numbers, dtype=dtype)
        return within if bias is None else bias + within

    def part(self, rows: slice, heads: slice) -> "Positions":
        """Of some rows and heads of a batch, as far as logits need them."""
        bias = self.bias
        if bias is not None:
            every = slice(None)
            bias = bias[rows if bias.shape[0] > 1 else every, heads if bias.shape[1] > 1 else every]
        slopes = None if self.slopes is None else self.slopes[heads]
        return Positions(self.tables, bias, slopes, None if self.numbers is None else self.numbers[rows])


def positions_of(
    config: ModelConfig, dtypes: Dtypes, tokens: Tensor, kernel: Kernel, boundaries: Tensor | None = None
) -> Positions:
    """Of whole rows of tokens, (batch, seq), for a kernel of `attention_kernels.choose`; `boundaries`: if known.

    Rotary positions and ALiBi depend on differences of positions alone, so they need not restart with a document.
    """
    seq_len, position, end = tokens.shape[1], config.axes.position, config.attention.document_end
    where = {"dtype": dtypes.parameter, "device": tokens.device}
    tables = position.tables(config, seq_len, d_head(config), **where)
    numbers = None if end is None else documents.numbers(tokens, end)
    if kernel == "varlen":
        assert end is not None
        boundaries = documents.boundaries(tokens, end) if boundaries is None else boundaries
        return Positions(tables, numbers=numbers, boundaries=boundaries)
    slopes = position.slopes(config, **where) if kernel == "flex" else None
    bias = None if slopes is not None else position.bias(config, seq_len, **where)
    bias = None if bias is None else bias[None]  # CPU kernels keep all weights for a bias of three dimensions
    if kernel == "flex":
        blocks = attention_kernels.block_mask(seq_len, tokens.device, numbers)
        return Positions(tables, bias, slopes, numbers, blocks=blocks)
    # Here, not in every layer. CUDA's fused kernels take a mask of the queries' dtype alone; 0 and -inf are exact.
    in_compute = bias is None or (kernel == "sdpa_masked" and tokens.device.type == "cuda")
    dtype = dtypes.compute if in_compute else dtypes.parameter
    if numbers is not None:
        within = documents.bias(numbers, dtype=dtype)
        bias = within if bias is None else bias + within
    return Positions(tables, None if bias is None else bias.to(dtype))
