"""The sizes of a training step that every contestant is given."""

from typing import NamedTuple


class Shape(NamedTuple):
    """`str` and `parse` write it as layers x width x batch x sequence: 12x384x4x512."""

    n_layers: int
    d_model: int
    batch: int
    seq_len: int

    def __str__(self) -> str:
        return "x".join(str(size) for size in self)

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """ValueError for what is not four positive integers, or a width that heads of 64 do not divide."""
        sizes = [int(size) for size in text.split("x")]
        if len(sizes) != 4 or min(sizes) < 1 or sizes[1] % 64:
            raise ValueError(text)
        return cls(*sizes)

    @property
    def n_heads(self) -> int:
        """Heads of 64 features, as most models have."""
        return self.d_model // 64

    @property
    def gated_width(self) -> int:
        """Of a gated feed-forward: the multiple of 16 whose three matrices are nearest to two of 4 d_model."""
        return round(8 * self.d_model / 3 / 16) * 16

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len
