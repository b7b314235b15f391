"""The linear map of the model, plain or reparametrised, and the dtypes that `train.precision` stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stablelm.config.schema import ModelConfig
from stablelm.methods import spectral
from stablelm.methods.axes import Reparam
from stablelm.methods.concatenation import Concatenation
from stablelm.model import float8
from stablelm.model.products import Vectors, one_matrix, product


@dataclass(frozen=True)
class Dtypes:
    """`parameter`: storage of weights; `compute`: inputs of matrix products; `stream`: the residual stream."""

    parameter: torch.dtype
    compute: torch.dtype
    stream: torch.dtype


def make_dtypes(precision: str, stream_dtype: str) -> Dtypes:
    """The dtypes of precision fp32, bf16 or fp64; `stream_dtype` (fp32 or bf16) counts under bf16 only."""
    if precision == "bf16":
        stream = torch.bfloat16 if stream_dtype == "bf16" else torch.float32
        return Dtypes(torch.float32, torch.bfloat16, stream)
    dtype = {"fp32": torch.float32, "fp64": torch.float64}[precision]
    return Dtypes(dtype, dtype, dtype)


class Linear(nn.Module):
    """x W^T + b with W (d_out, d_in) kept in the parameter dtype; multiplies and returns in the compute dtype.

    With `reparam`, what W stands for: its parameters and buffers, in the parameter dtype, beside W, and a factor of W's
    rows. Whoever sets them in place, and not by `load_state_dict`, calls `derive`.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool, dtypes: Dtypes, reparam: Reparam | None = None):
        super().__init__()
        self.compute_dtype, self.reparam = dtypes.compute, reparam
        self.float8: str | None = None  # a recipe of `model.float8`, for passes with gradients
        self.weight = nn.Parameter(torch.empty(d_out, d_in, dtype=dtypes.parameter))
        self.bias = nn.Parameter(torch.empty(d_out, dtype=dtypes.parameter)) if bias else None
        if reparam is not None:
            for name, shape in reparam.parameters(d_in, d_out).items():
                self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtypes.parameter)))
            for name, shape in reparam.buffers(d_in, d_out).items():
                self.register_buffer(name, torch.empty(shape, dtype=dtypes.parameter))
            for name, shape in reparam.derived().items():
                self.register_buffer(name, torch.empty(shape, dtype=dtypes.parameter), persistent=False)
            self.register_load_state_dict_post_hook(_derive_loaded)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # what a reparametrisation registers

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        return side_by_side((self,), x)

    @property
    def factor(self) -> Tensor | None:
        """What multiplies the rows of W, (1,) or (d_out,) in the parameter dtype; None: nothing."""
        return None if self.reparam is None else self.reparam.factor(self)

    @property
    def first(self) -> "Linear":
        """The map that meets the input: itself."""
        return self

    def rest(self, product: Tensor) -> Tensor:
        """What follows `first`: nothing."""
        return product

    def scaled(self) -> Tensor:
        """The matrix that W stands for, in the parameter dtype."""
        factor = self.factor
        return self.weight if factor is None else self.weight * factor[:, None]

    @torch.no_grad()
    def fix(self) -> None:
        """For a model that is not trained any more: the factor goes into the weight, which takes the compute dtype.

        In memory it is turned round, which CPUs multiply faster with a few rows, as when a text grows token by token.
        """
        turned = self.scaled().to(self.compute_dtype).t().contiguous().t()
        self.weight, self.reparam = nn.Parameter(turned, requires_grad=False), None


def derive(module: nn.Module) -> None:
    """Brings buffers that follow from weights and other buffers up to date: after these were set, of whole matrices.

    An engine's `loaded` does it for weights in parts.
    """
    maps = [part for part in module.modules() if isinstance(part, Linear) and part.reparam is not None]
    reparam = maps[0].reparam if maps else None
    if reparam is not None and reparam.derived():
        reparam.derive(list(map(spectral.whole, maps)), None)


def _derive_loaded(linear: Linear, _: object) -> None:
    if linear.reparam is not None:
        for name in linear.reparam.derived():
            if getattr(linear, name).is_meta:  # tensors may have been assigned to a module without memory
                setattr(linear, name, torch.empty_like(getattr(linear, name), device=linear.weight.device))
    derive(linear)


def reparam_of(config: ModelConfig, sublayer: int) -> Reparam | None:
    """The reparametrisation of a sub-layer's matrices, None where they are what they are."""
    reparam = config.axes.reparam
    return reparam if reparam.applies(config, sublayer) else None


def side_by_side(maps: "Sequence[Linear | LowRankLinear]", x: Tensor) -> Tensor:
    """x: (..., d_in) -> what all maps make of it in the compute dtype, (..., d_out of all), by one product."""
    return finished(maps, first_product(maps, x))


def first_product(maps: "Sequence[Linear | LowRankLinear]", x: Tensor, *, keep: bool = False) -> Tensor:
    """What the first matrices of all maps make of x, side by side in the compute dtype; `keep`: as of `product`."""
    first = [linear.first for linear in maps]
    weights, x = [linear.weight for linear in first], x.to(first[0].compute_dtype)
    recipe = first[0].float8 if torch.is_grad_enabled() else None
    # A compiler fuses casts and factors, and their gradients, by itself.
    if torch.compiler.is_compiling():
        if weights[0].dtype == x.dtype:
            made = [float8.linear(x, weight, None, recipe) for weight in weights]
            return _completed(first, torch.cat(made, dim=-1))
        matrix = torch.cat([linear.scaled().to(x.dtype) for linear in first])
        return float8.linear(x, matrix, _bias(first, x.dtype), recipe)
    gains, vectors = _scales(first)
    if len(first) == 1 and not gains and recipe is None:
        return F.linear(x, weights[0].to(x.dtype), _bias(first, x.dtype))
    return product(x, weights, gains, vectors, _bias(first, x.dtype), keep=keep, recipe=recipe)


def product_of_concatenation(
    maps: "Sequence[Linear | LowRankLinear]",
    stream: Concatenation,
    gain: Tensor,
    shift: Tensor | None,
    *,
    centred: bool,
    eps: float,
) -> tuple[Concatenation, Tensor]:
    """The stream that is appended to next, and what all maps make of it after a norm with that gain and bias, (width,)
    each, (batch, seq, d_out of all) in the compute dtype; `centred`: the norm subtracts the mean."""
    first = [linear.first for linear in maps]
    weights, dtype = [linear.weight for linear in first], first[0].compute_dtype
    gains, vectors = _scales(first)

    make = partial(one_matrix, weights, gains, vectors, dtype, gain, stream.read_width)
    # As of `product`: the weights of an engine that shards them come in the compute dtype.
    stream, made = stream.read(make(), make if weights[0].dtype == dtype else None, centred=centred, eps=eps)
    bias = _bias(first, dtype)
    if shift is not None:
        bias = F.linear(shift.to(dtype), one_matrix(weights, gains, vectors, dtype), bias)
    return stream, finished(maps, made if bias is None else made + bias)


def _scales(maps: Sequence[Linear]) -> tuple[list[Tensor], list[Vectors]]:
    """What `products.one_matrix` makes one matrix of several with, beside the weights."""
    quotients = [linear.reparam.quotient(linear) for linear in maps if linear.reparam is not None]
    found = [quotient for quotient in quotients if quotient is not None]
    return [gain for gain, *_ in found] if found else _factors(maps), [Vectors(*own) for _, *own in found]


def finished(maps: "Sequence[Linear | LowRankLinear]", product: Tensor) -> Tensor:
    """What all maps make, from the products, with factors and biases, of their first matrices."""
    if all(isinstance(linear, Linear) for linear in maps):
        return product
    parts = product.split([len(linear.first.weight) for linear in maps], dim=-1)
    return torch.cat([linear.rest(part) for linear, part in zip(maps, parts, strict=True)], dim=-1)


def completed(maps: "Sequence[Linear | LowRankLinear]", product: Tensor) -> Tensor:
    """What all maps make, from the products x W^T of their first matrices."""
    return finished(maps, _completed([linear.first for linear in maps], product))


def _completed(maps: Sequence[Linear], product: Tensor) -> Tensor:
    factors, bias = _factors(maps), _bias(maps, product.dtype)
    if factors:
        rows = [factor.expand(len(linear.weight)) for linear, factor in zip(maps, factors, strict=True)]
        product = product * torch.cat(rows).to(product.dtype)
    return product if bias is None else product + bias


def _factors(maps: Sequence[Linear]) -> list[Tensor]:
    """The factor of each map; none if no map has one."""
    factors = [linear.factor for linear in maps]
    if all(factor is None for factor in factors):
        return []
    return [maps[0].weight.new_ones(1) if factor is None else factor for factor in factors]


def _bias(maps: Sequence[Linear], dtype: torch.dtype) -> Tensor | None:
    """The biases side by side, zeros for maps without one; None where no map has one."""
    if all(linear.bias is None for linear in maps):
        return None
    whole = [linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias for linear in maps]
    return (whole[0] if len(whole) == 1 else torch.cat(whole)).to(dtype)


class LowRankLinear(nn.Module):
    """Two factors, d_in -> rank -> d_out, in place of one matrix (MLRA: arXiv 2409.07787)."""

    def __init__(self, d_in: int, rank: int, d_out: int, *, bias: bool, dtypes: Dtypes, reparam: Reparam | None = None):
        super().__init__()
        self.down = Linear(d_in, rank, bias=False, dtypes=dtypes, reparam=reparam)
        self.up = Linear(rank, d_out, bias=bias, dtypes=dtypes, reparam=reparam)

    @property
    def first(self) -> Linear:
        """The map that meets the input, d_in -> rank."""
        return self.down

    def rest(self, product: Tensor) -> Tensor:
        """What follows `first`."""
        return self.up(product)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        return self.up(self.down(x))
