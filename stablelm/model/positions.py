"""What every attention body needs of the positions, made once for all layers."""

from torch import Tensor

Positions = tuple[Tensor, ...]
"""The tables of positions that turn queries and keys, two or none; then what documents or positions add: a bias on the
logits, (heads, seq, seq) or (batch, heads or 1, seq, seq), or int32 boundaries of documents."""


def bias_of(positions: Positions) -> Tensor | None:
    """The bias or the boundaries of documents, if there are any."""
    return positions[-1] if len(positions) % 2 else None


def of_part(positions: Positions, rows: slice, heads: slice) -> Positions:
    """The positions of some rows and heads of a batch."""
    bias = bias_of(positions)
    if bias is None:
        return positions
    if bias.ndim == 3:
        return (*positions[:-1], bias[heads])
    return (*positions[:-1], bias[rows, heads if bias.shape[1] > 1 else slice(None)])
