"""Keys and values of the tokens so far, so that each token passes through the model once while text is generated.

Every row of a batch has a length of its own. The key of a row's token at position p stands in column p, so a row never
depends on the others: prompts of unequal length are filled up on the right, and what stands beyond a row's length is
neither seen nor kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods import catalogue
from stablelm.methods.axes import Shaping
from stablelm.methods.sizes import d_head
from stablelm.model.attention import documents
from stablelm.model.attention.positions import Positions
from stablelm.model.linear import Dtypes

LEAST_COLUMNS = 64


class LayerCache:
    """The keys and values of one layer, (batch, kv_heads, columns, d_head), as attention multiplies them."""

    def __init__(self, whole: "KeyValueCache"):
        self._whole = whole
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps those of the new tokens, (batch, kv_heads, new, d_head); returns all up to the longest row."""
        self.key, self.value = self._kept(self.key, key), self._kept(self.value, value)
        if self._whole.start == 0:
            return key, value
        return self.key[:, :, : self._whole.end], self.value[:, :, : self._whole.end]

    def _kept(self, held: Tensor | None, new: Tensor) -> Tensor:
        held, new = _with_columns(held, new, 2, self._whole.columns), new.detach()
        if self._whole.start is not None:
            held[:, :, self._whole.start : self._whole.end] = new
        else:
            held[self._whole.rows, :, self._whole.places] = new.transpose(1, 2)
        return held

    def of_new(self, kept: Tensor) -> Tensor:
        """Those of the new tokens, (batch, heads, new, d_head), from all that `extend` returned."""
        whole = self._whole
        if whole.start == 0:
            return kept
        if whole.start is not None:
            return kept[:, :, whole.start :]
        places = whole.places[:, None, :, None].expand(-1, kept.shape[1], -1, kept.shape[3])
        return kept.gather(2, places)

    def shaped(self, shaping: Shaping, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The shaping's bias (batch or 1, 1, new, columns) and factors (batch or 1, 1, new, 1) for the new tokens."""
        places, whole = self._whole.places, self._whole
        both = shaping.rows(whole.config, layer, places.flatten().cpu().numpy(), whole.end)
        bias, factors = (torch.from_numpy(each).to(places.device, dtype) for each in both)
        return bias.unflatten(0, places.shape)[:, None], factors.unflatten(0, places.shape)[:, None, :, None]

    def select(self, rows: Tensor) -> None:
        """Keeps these rows of the batch."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]


class KeyValueCache:
    """What `Decoder` keeps of `batch` rows of tokens: `module(tokens, cache=cache)` appends tokens to every row.

    `reserve`: columns to make room for at once, otherwise it doubles. `lengths`: tokens of each row. Where rows get
    unequal numbers of new tokens, these are filled up on the right, and `keep` then says what counts. Not for training:
    no gradients pass through it. Raises ValueError for a model in which something depends on later tokens.
    """

    def __init__(self, config: ModelConfig, batch: int, *, reserve: int = 0):
        if obstacles := catalogue.cache_obstacles(config):
            raise ValueError(f"keys and values cannot be kept: {'; '.join(obstacles)}")
        self.config, self.lengths = config, [0] * batch
        self.layers = [LayerCache(self) for _ in range(config.n_layers)]
        self.columns, self._reserve = 0, reserve
        self._tables: tuple[Tensor, ...] = ()
        self._tokens: Tensor | None = None
        # Of the call under way: the rows' common start (None: they differ), the end of the longest row, and where the
        # new tokens stand, (batch, 1) and (batch, new), or (1, new) with a common start.
        self.start: int | None = 0
        self.end = 0
        self.rows = self.places = torch.empty(0)

    def enter(self, tokens: Tensor, dtypes: Dtypes) -> Positions:
        """Makes room for tokens (batch, new); what attention needs of their positions. `leave` ends the call."""
        batch, new = tokens.shape
        assert batch == len(self.lengths), "a cache takes as many rows as it was made for"
        self.end = max(self.lengths) + new
        self.start = self.lengths[0] if len(set(self.lengths)) == 1 else None
        starts = torch.tensor(self.lengths[:1] if self.start is not None else self.lengths, device=tokens.device)
        self.rows = torch.arange(batch, device=tokens.device)[:, None]
        self.places = starts[:, None] + torch.arange(new, device=tokens.device)
        where = {"dtype": dtypes.parameter, "device": tokens.device}
        if self.end > self.columns:
            self.columns = max(self.end, self._reserve, 2 * self.columns, LEAST_COLUMNS)
            self._tables = self.config.axes.position.tables(self.config, self.columns, d_head(self.config), **where)
        if self.config.attention.document_end is not None:
            self._tokens = _with_columns(self._tokens, tokens, 1, self.columns)
            self._tokens[self.rows, self.places] = tokens
        return Positions(tuple(self._rows_of(table) for table in self._tables), self._bias(new, **where))

    def leave(self, new: int) -> None:
        """The tokens of the call are kept."""
        self.lengths = [length + new for length in self.lengths]

    def keep(self, lengths: Sequence[int]) -> None:
        """Forgets what stands beyond these lengths."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch, in this order; a row may be taken more than once."""
        self.lengths = [self.lengths[row] for row in rows]
        chosen = torch.tensor(rows, device=self.places.device)
        self._tokens = None if self._tokens is None else self._tokens[chosen]
        for layer in self.layers:
            layer.select(chosen)

    def document_places(self, end: int) -> Tensor:
        """(batch, new): how many tokens of its document come before each new token."""
        assert self._tokens is not None
        return documents.places(self._tokens[:, : self.end], end)[self.rows, self.places]

    def _rows_of(self, table: Tensor) -> Tensor:
        return table[self.start : self.end] if self.start is not None else table[self.places]

    def _bias(self, new: int, **where) -> Tensor | None:
        """(batch or 1, heads or 1, new, columns), with what hides later tokens; None where nothing or only the order of
        the new tokens does."""
        bias = self.config.axes.position.bias_at(self.config, self.places, self.end, **where)
        end = self.config.attention.document_end
        if end is not None:
            assert self._tokens is not None
            number = documents.numbers(self._tokens[:, : self.end], end)
            hidden = self._later() | (number[self.rows, self.places][:, :, None] != number[:, None, :])
        elif bias is not None or self.config.axes.shaping.active or self.start == 0:
            return bias
        elif self.start is not None and new == 1:
            return None  # a single token sees all
        else:
            hidden = self._later()
        mask = torch.zeros(hidden.shape, **where).masked_fill_(hidden, -torch.inf)[:, None]
        return mask if bias is None else bias + mask

    def _later(self) -> Tensor:
        """(batch or 1, new, columns) bool: the columns after each new token."""
        return torch.arange(self.end, device=self.places.device) > self.places[:, :, None]


def _with_columns(held: Tensor | None, new: Tensor, dim: int, columns: int) -> Tensor:
    """`held` with room for so many columns along `dim`, zeros where there is nothing yet; other sizes are `new`'s."""
    if held is not None and held.shape[dim] >= columns:
        return held
    shape = list(new.shape)
    shape[dim] = columns
    wider = new.new_zeros(shape)
    if held is not None:
        wider.narrow(dim, 0, held.shape[dim]).copy_(held)
    return wider
