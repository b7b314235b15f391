"""The only block code: read, norm by placement, body, dropout, write onto the stream."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablelm.config.schema import ModelConfig
from stablelm.methods.concatenation import Concatenation
from stablelm.methods.sizes import fits_float8
from stablelm.model.added_parameters import add_parameters, named_parameters_of
from stablelm.model.attention.body import Attention
from stablelm.model.attention.cache import LayerCache
from stablelm.model.attention.positions import Positions
from stablelm.model.feedforward import FeedForward
from stablelm.model.linear import (
    Dtypes,
    Linear,
    completed,
    finished,
    first_product,
    product_of_concatenation,
    side_by_side,
)
from stablelm.model.norms import Norm

Chunks = tuple[Tensor, ...]
Products = tuple[Tensor, ...]


class Sublayer(nn.Module):
    """One body (attention or feed-forward) with its norms and its way onto the stream; `index` counts both kinds.

    `enter` reads the stream and applies the body's first maps, `leave` computes the branch from them and writes it.
    """

    def __init__(self, config: ModelConfig, dtypes: Dtypes, index: int):
        super().__init__()
        axes, layer = config.axes, index // 2
        placement, width = axes.placement.at(config, index), axes.stream.widths(config, index)
        self.stream = axes.stream.at(config, index)
        self.compute_dtype = dtypes.compute
        self.separate = axes.stream.separate_inputs(config, index)
        # For gradients, tensors put side by side at every depth would keep memory that grows with the depth's square.
        self.frees_input = self.stream.grows
        scale, eps_scale = placement.input_scale(layer), self.stream.eps_scale(config, index)
        before = placement.before_body
        self.norm_in = Norm(config, dtypes, width.read, scale=scale, eps_scale=eps_scale) if before else None
        self.body: Attention | FeedForward
        self.body = FeedForward(config, dtypes, width, index) if index % 2 else Attention(config, dtypes, width, layer)
        # Of the maps after the first, where each has an input of its own.
        self.others = [f"norm_in_{place}" for place in range(1, len(self.body.first_maps))] if self.separate else []
        for name in self.others:
            norm = Norm(config, dtypes, width.read, scale=scale, eps_scale=eps_scale) if before else None
            self.register_module(name, norm)
        self.norm_branch = Norm(config, dtypes, width.branch) if placement.on_branch else None
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("stacked", None, persistent=False)
        added = self.stream.in_sublayer(config, index)
        self.added, self.added_maps = add_parameters(self, added, dtypes), [each.name for each in added if each.map]
        self.norm_out = Norm(config, dtypes, width.branch) if placement.after_write else None

    if TYPE_CHECKING:
        stacked: Tensor | None

    @property
    def takes_concatenation(self) -> bool:
        """Whether `enter` can read a `Concatenation`: all that its norm does can go into a product."""
        norm, first = self.norm_in, self.body.first_maps[0].first
        one_product = self.stacked is None and not self.separate and not self.body.passes_input and first.float8 is None
        return one_product and norm is not None and norm.kind.standard is not None

    def enter(self, chunks: Chunks) -> tuple[Chunks, Products]:
        """chunks: the stream -> the stream that is written to, and what `body.first_maps` make of it, (batch, seq, each
        of `body.first_widths`) in the compute dtype; with `body.passes_input`, what they read comes second."""
        maps, read = self.body.first_maps, None
        if isinstance(chunks, Concatenation):
            norm = self.norm_in
            assert norm is not None
            centred = norm.kind.standard == "layer"
            chunks, made = product_of_concatenation(maps, chunks, *norm.affine, centred=centred, eps=norm.eps)
        elif self.separate:
            inputs = self._read_each(chunks)
            made = torch.cat([side_by_side((linear,), x) for linear, x in zip(maps, inputs, strict=True)], dim=-1)
        elif self.frees_input and self.stacked is None and torch.is_grad_enabled():
            made = checkpoint(self._product, *chunks, use_reentrant=False, preserve_rng_state=False)
            made = finished(maps, made)
        else:
            read = self._read(*chunks)
            made = side_by_side(maps, read) if self.stacked is None else completed(maps, F.linear(read, self.stacked))
        widths = self.body.first_widths
        products = (made,) if len(widths) == 1 else made.split(widths, dim=-1)
        if not self.body.passes_input:
            return chunks, products
        assert read is not None
        return chunks, (products[0], read, *products[1:])

    @torch.no_grad()
    def fix(self) -> None:
        """For a model that is not trained any more: fixes its maps; first ones of one input become a matrix."""
        for part in self.body.modules():
            if isinstance(part, Linear):
                part.fix()
        if self.separate:
            return
        first = [linear.first for linear in self.body.first_maps]
        columns = torch.cat([linear.weight.t() for linear in first], dim=1)
        for linear, part in zip(first, columns.split([len(linear.weight) for linear in first], dim=1), strict=True):
            linear.weight = nn.Parameter(part.t(), requires_grad=False)
        self.stacked = columns.t()

    def use_float8(self, recipe: str, least: int) -> None:
        """Passes with gradients multiply by the maps in a recipe of `model.float8`, where `fits_float8`."""
        first = [linear.first for linear in self.body.first_maps]
        others = [[part] for part in self.body.modules() if isinstance(part, Linear) and part not in first]
        side_by_side = [[linear] for linear in first] if self.separate else [first]
        for maps in (*side_by_side, *others):
            if fits_float8(maps[0].weight.shape[1], [len(linear.weight) for linear in maps], least):
                for linear in maps:
                    linear.float8 = recipe

    def _read(self, *chunks: Tensor) -> Tensor:
        x = self.stream.read(chunks, self._added())
        if self.norm_in is not None:
            x = self.norm_in(x)
        return x.to(self.compute_dtype)

    def _read_each(self, chunks: Chunks) -> Chunks:
        norms = [self.norm_in, *(getattr(self, name) for name in self.others)]
        read = zip(norms, self.stream.read_each(chunks, self._added()), strict=True)
        return tuple((x if norm is None else norm(x)).to(self.compute_dtype) for norm, x in read)

    def _added(self) -> dict[str, Tensor]:
        return named_parameters_of(self, self.added, self.compute_dtype)

    def _product(self, *chunks: Tensor) -> Tensor:
        """The product comes last: recompute stops at its saved input and does not repeat it."""
        return first_product(self.body.first_maps, self._read(*chunks), keep=True)

    def leave(
        self,
        chunks: Chunks,
        products: Products,
        positions: Positions,
        cache: LayerCache | None = None,
        factor: Tensor | None = None,
    ) -> Chunks:
        """The tensors from which `Stream.join` makes the next stream, in the stream's dtype.

        `factor`: 0-dim, multiplies the branch; None: 1.
        """
        branch = self.body(products, positions, cache=cache)
        if self.norm_branch is not None:
            branch = self.norm_branch(branch)
        branch = self.dropout(branch)
        if factor is not None:
            branch = branch * factor.to(branch.dtype)
        new = self.stream.write(chunks, branch, self._added())
        if self.norm_out is not None:
            normed = len(new) if self.stream.normed is None else self.stream.normed
            new = (*(self.norm_out(chunk).to(chunk.dtype) for chunk in new[:normed]), *new[normed:])
        return new


class Layer(nn.Module):
    """An attention and a feed-forward sub-layer: the unit of recompute, compilation and sharding; counted from 0."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes, index: int):
        super().__init__()
        self.stream, self.value_mixing = config.axes.stream.at(config), config.axes.value_mixing
        self.gives_values = self.value_mixing.share is not None and index == 0
        self.attention = Sublayer(config, dtypes, 2 * index)
        self.feedforward = Sublayer(config, dtypes, 2 * index + 1)
        added, self.compute_dtype = self.stream.in_layer(config, index), dtypes.compute
        self.added, self.added_maps = add_parameters(self, added, dtypes), [each.name for each in added if each.map]

    def forward(
        self,
        chunks: Chunks,
        positions: Positions,
        values: Chunks = (),
        cache: LayerCache | None = None,
        factors: Tensor | None = None,
    ) -> Chunks:
        """The tensors from which `Stream.join` makes the next stream; chunks: (batch, seq, width) each.

        With value mixing, layer 0 also returns its values as the last tensor; later layers receive them as `values`.
        With a cache, all of these are of the new tokens alone. `factors`: (2,), what multiplies the branches.
        """
        return self.compute(chunks, positions, values, cache, factors)

    def compute(
        self, chunks: Chunks, positions: Positions, values: Chunks, cache: LayerCache | None, factors: Tensor | None
    ) -> Chunks:
        """`forward`; apart, so that recompute may wrap it inside of what is compiled."""
        factor, factor_fed = (None, None) if factors is None else factors.unbind()
        attended, own = self.attend(chunks, positions, values, cache, factor)
        between = self.stream.join(chunks, attended)
        read = chunks if self.stream.parallel else between
        read, products = self.feedforward.enter(read)
        fed = self.feedforward.leave(between if self.stream.parallel else read, products, positions, factor=factor_fed)
        added = named_parameters_of(self, self.added, self.compute_dtype)
        new = self.stream.end_layer(chunks, self.stream.join(attended, fed), added)
        return (*new, own) if own is not None else new

    def attend(
        self, chunks: Chunks, positions: Positions, values: Chunks, cache: LayerCache | None, factor: Tensor | None
    ) -> tuple[Chunks, Tensor | None]:
        """The attention sub-layer as `Sublayer.leave` returns it, and the layer's own values if it gives them."""
        chunks, products = self.attention.enter(chunks)
        own = products[1]
        if values:
            body = self.attention.body
            assert isinstance(body, Attention)
            mixed = self.value_mixing.mix(own, values[0], body.added_parameters())
            products = (products[0], mixed, *products[2:])
        left = self.attention.leave(chunks, products, positions, cache, factor)
        return left, own if self.gives_values else None
