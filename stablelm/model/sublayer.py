"""The only block code: read, norm by placement, body, dropout, write onto the stream."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablelm.config.schema import ModelConfig
from stablelm.methods.axes import Added
from stablelm.methods.sizes import fits_float8
from stablelm.model.attention.body import Attention
from stablelm.model.attention.cache import LayerCache
from stablelm.model.attention.positions import Positions
from stablelm.model.feedforward import FeedForward
from stablelm.model.linear import Dtypes, Linear, completed, finished, first_product, side_by_side
from stablelm.model.norms import Norm

Chunks = tuple[Tensor, ...]
Products = tuple[Tensor, ...]


def _add(module: nn.Module, parameters: tuple[Added, ...], dtypes: Dtypes) -> tuple[str, ...]:
    """Registers the parameters that an axis value adds to a module, uninitialised, and returns their names."""
    for parameter in parameters:
        empty = torch.empty(parameter.start.shape, dtype=dtypes.parameter)
        module.register_parameter(parameter.name, nn.Parameter(empty))
    return tuple(parameter.name for parameter in parameters)


def named_parameters_of(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """These parameters of a module, by name."""
    return {name: getattr(module, name) for name in names}


class Sublayer(nn.Module):
    """One body (attention or feed-forward) with its norms and its way onto the stream; `index` counts both kinds.

    `enter` reads the stream and applies the body's first maps, `leave` computes the branch from them and writes it.
    """

    def __init__(self, config: ModelConfig, dtypes: Dtypes, index: int):
        super().__init__()
        axes, layer = config.axes, index // 2
        placement, width = axes.placement, axes.stream.widths(config, index)
        self.stream = axes.stream.at(config)
        self.compute_dtype = dtypes.compute
        # For gradients, a concatenation at every depth would keep memory that grows with the square of the depth.
        self.frees_input = self.stream.grows
        scale, eps_scale = placement.input_scale(layer), self.stream.eps_scale(config, index)
        before = placement.before_body
        self.norm_in = Norm(config, dtypes, width.read, scale=scale, eps_scale=eps_scale) if before else None
        self.body: Attention | FeedForward
        self.body = FeedForward(config, dtypes, width, index) if index % 2 else Attention(config, dtypes, width, layer)
        self.norm_branch = Norm(config, dtypes, width.branch) if placement.on_branch else None
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("stacked", None, persistent=False)
        self.added = _add(self, self.stream.in_sublayer(config, index), dtypes)
        self.norm_out = Norm(config, dtypes, width.branch) if placement.after_write else None

    if TYPE_CHECKING:
        stacked: Tensor | None

    def enter(self, chunks: Chunks) -> Products:
        """chunks: the stream -> what `body.first_maps` make of it, (batch, seq, each of `body.first_widths`) in the
        compute dtype."""
        maps = self.body.first_maps
        if self.stacked is not None:
            made = completed(maps, F.linear(self._read(*chunks), self.stacked))
        elif not self.frees_input or not torch.is_grad_enabled():
            made = side_by_side(maps, self._read(*chunks))
        else:
            made = checkpoint(self._product, *chunks, use_reentrant=False, preserve_rng_state=False)
            made = finished(maps, made)
        widths = self.body.first_widths
        return (made,) if len(widths) == 1 else made.split(widths, dim=-1)

    @torch.no_grad()
    def fix(self) -> None:
        """For a model that is not trained any more: fixes its maps; the first ones become parts of one matrix."""
        for part in self.body.modules():
            if isinstance(part, Linear):
                part.fix()
        maps = self.body.first_maps
        first = [linear.first for linear in maps]
        columns = torch.cat([linear.weight.t() for linear in first], dim=1)
        for linear, part in zip(first, columns.split([len(linear.weight) for linear in first], dim=1), strict=True):
            linear.weight = nn.Parameter(part.t(), requires_grad=False)
        self.stacked = columns.t()

    def use_float8(self, recipe: str, least: int) -> None:
        """Passes with gradients multiply by the maps in a recipe of `model.float8`, where `fits_float8`."""
        first = [linear.first for linear in self.body.first_maps]
        others = [[part] for part in self.body.modules() if isinstance(part, Linear) and part not in first]
        for maps in (first, *others):
            if fits_float8(maps[0].weight.shape[1], [len(linear.weight) for linear in maps], least):
                for linear in maps:
                    linear.float8 = recipe

    def _read(self, *chunks: Tensor) -> Tensor:
        x = self.stream.read(chunks, named_parameters_of(self, self.added))
        if self.norm_in is not None:
            x = self.norm_in(x)
        return x.to(self.compute_dtype)

    def _product(self, *chunks: Tensor) -> Tensor:
        """The product comes last: recompute stops at its saved input and does not repeat it."""
        return first_product(self.body.first_maps, self._read(*chunks), keep=True)

    def leave(
        self, chunks: Chunks, products: Products, positions: Positions, cache: LayerCache | None = None
    ) -> Chunks:
        """The tensors from which `Stream.join` makes the next stream, in the stream's dtype."""
        branch = self.body(products, positions, cache=cache)
        if self.norm_branch is not None:
            branch = self.norm_branch(branch)
        new = self.stream.write(chunks, self.dropout(branch), named_parameters_of(self, self.added))
        if self.norm_out is not None:
            new = tuple(self.norm_out(chunk).to(chunk.dtype) for chunk in new)
        return new


class Layer(nn.Module):
    """An attention and a feed-forward sub-layer: the unit of recompute, compilation and sharding; counted from 0."""

    def __init__(self, config: ModelConfig, dtypes: Dtypes, index: int):
        super().__init__()
        self.stream, self.value_mixing = config.axes.stream.at(config), config.axes.value_mixing
        self.gives_values = self.value_mixing.share is not None and index == 0
        self.attention = Sublayer(config, dtypes, 2 * index)
        self.feedforward = Sublayer(config, dtypes, 2 * index + 1)
        self.added = _add(self, self.stream.in_layer(config, index), dtypes)
        self.added_to_values = _add(self, self.value_mixing.in_layer(config, index), dtypes)

    def forward(
        self, chunks: Chunks, positions: Positions, values: Chunks = (), cache: LayerCache | None = None
    ) -> Chunks:
        """The tensors from which `Stream.join` makes the next stream; chunks: (batch, seq, width) each.

        With value mixing, layer 0 also returns its values as the last tensor; later layers receive them as `values`.
        With a cache, all of these are of the new tokens alone.
        """
        return self.compute(chunks, positions, values, cache)

    def compute(self, chunks: Chunks, positions: Positions, values: Chunks, cache: LayerCache | None) -> Chunks:
        """`forward`; apart, so that recompute may wrap it inside of what is compiled."""
        attended, own = self.attend(chunks, positions, values, cache)
        between = self.stream.join(chunks, attended)
        fed = self.feedforward.leave(between, self.feedforward.enter(between), positions)
        new = self.stream.end_layer(chunks, self.stream.join(attended, fed), named_parameters_of(self, self.added))
        return (*new, own) if own is not None else new

    def attend(
        self, chunks: Chunks, positions: Positions, values: Chunks, cache: LayerCache | None
    ) -> tuple[Chunks, Tensor | None]:
        """The attention sub-layer as `Sublayer.leave` returns it, and the layer's own values if it gives them."""
        products = self.attention.enter(chunks)
        *rest, own = products
        if values:
            added = named_parameters_of(self, self.added_to_values)
            products = (*rest, self.value_mixing.mix(own, values[0], added))
        return self.attention.leave(chunks, products, positions, cache), own if self.gives_values else None
