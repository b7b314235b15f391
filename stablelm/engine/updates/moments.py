"""AdamW whose moments take two bytes or one an element: `train.moments`.

The update itself is torch's fused one in fp32: moments are read into fp32, updated, and rounded to the nearest value
that their storage has. bf16 keeps 8 bits of precision. int8 (Dettmers et al., 8-bit Optimizers via Block-wise
Quantization, 2022) keeps a code of torchao's dynamic map and an fp32 scale for each block, its largest magnitude. A
block is part of a row, so that any split by rows has the same blocks; vectors and matrices of odd widths stay fp32.
torchao's own optimizers were tried: they compile a kernel for each shape and know no skipped step.
"""

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as adamw_update

from stablelm.engine.tensor_parts import local_part
from stablelm.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALE = "_scale"
BLOCK, SMALLEST_BLOCK = 256, 32
AT_ONCE = 2**20
"""Elements that are read into fp32 together."""


def check_moments(moments: str) -> None:
    """ConfigError if what they need is not installed."""
    if moments == "int8" and find_spec("torchao") is None:
        raise ConfigError(
            'train.moments=int8 needs torchao, which is not installed; pip install "stablelm[torchao]", or use '
            "train.moments=bf16"
        )


def scale_shape(shape: tuple[int, ...], moments: str) -> tuple[int, int] | None:
    """The scales of an int8 moment, one a block of a row; None for a moment that has none."""
    block = math.gcd(shape[-1], BLOCK) if len(shape) == 2 else 0
    return (shape[0], shape[1] // block) if moments == "int8" and block >= SMALLEST_BLOCK else None


def moment_shapes(shape: tuple[int, ...], moments: str) -> dict[str, torch.Size]:
    """The tensors that hold both moments of a parameter, by name."""
    scales = scale_shape(tuple(shape), moments)
    found = dict.fromkeys(MOMENTS, torch.Size(shape))
    return found | ({} if scales is None else {name + SCALE: torch.Size(scales) for name in MOMENTS})


def bytes_of_moments(shape: tuple[int, ...], moments: str, width: int) -> int:
    """Of both moments of a parameter with `width` bytes an element."""
    elements, scales = math.prod(shape), scale_shape(shape, moments)
    if scales is not None:
        return 2 * (elements + 4 * math.prod(scales))
    return 2 * elements * (2 if moments == "bf16" else width)


def empty_moments(parameter: Tensor, moments: str) -> dict[str, Tensor]:
    """Both moments before the first step, with their scales, laid out over ranks like the parameter."""
    scales = scale_shape(tuple(parameter.shape), moments)
    dtype = torch.uint8 if scales is not None else torch.bfloat16 if moments == "bf16" else parameter.dtype
    found: dict[str, Tensor] = {}
    for name in MOMENTS:
        found[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format).detach()
        if scales is not None:
            found[name + SCALE] = _scales(parameter, scales)
    return found


def _scales(parameter: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros, so that any code stands for zero."""
    local = local_part(parameter).detach()
    own = local.new_zeros(local.shape[0], shape[1], dtype=torch.float32)
    if not isinstance(parameter, DTensor):
        return own
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


class CompactAdamW(torch.optim.AdamW):
    """torch's AdamW over the moments of `empty_moments`; like its fused kernel it leaves out a step by `found_inf`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            update(self, group, group["params"])


class _Piece(NamedTuple):
    """A range of a parameter's elements, 1-dim; a moment is its stored values and their scales (None: none)."""

    weight: Tensor
    gradient: Tensor
    moments: tuple[tuple[Tensor, Tensor | None], ...]
    step: Tensor


@torch.no_grad()
def update(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
    """AdamW's update of some parameters of a group that have gradients, by the optimizer's state."""
    skipped: Tensor | None = getattr(optimizer, "found_inf", None)
    held = [parameter for parameter in parameters if parameter.grad is not None]
    for pieces in _together(piece for parameter in held for piece in _pieces(parameter, optimizer.state[parameter])):
        means, squares = ([_read(*piece.moments[at], signed=at == 0) for piece in pieces] for at in (0, 1))
        adamw_update(
            [piece.weight for piece in pieces],
            [piece.gradient for piece in pieces],
            means,
            squares,
            [],
            [piece.step.clone() for piece in pieces],  # each parameter counts once, below
            fused=True,
            found_inf=skipped,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for at, values in enumerate((means, squares)):
            for piece, value in zip(pieces, values, strict=True):
                _write(*piece.moments[at], value, skipped, signed=at == 0)
    for parameter in held:
        step = optimizer.state[parameter]["step"]
        step += 1.0 if skipped is None else 1.0 - skipped.to(step.device)


def _pieces(parameter: nn.Parameter, state: dict[str, Tensor]) -> Iterator[_Piece]:
    assert parameter.grad is not None
    weight, gradient = (local_part(tensor).detach().reshape(-1) for tensor in (parameter, parameter.grad))
    for start in range(0, len(weight), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        moments = []
        for name in MOMENTS:
            stored, scale = local_part(state[name]).view(-1), None
            if name + SCALE in state:
                scales = local_part(state[name + SCALE]).view(-1)
                block = len(stored) // len(scales)
                scale = scales[start // block : (start + AT_ONCE) // block]
            moments.append((stored[part], scale))
        yield _Piece(weight[part], gradient[part], tuple(moments), state["step"])


def _together(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Small pieces in one kernel call, large ones alone."""
    found: list[_Piece] = []
    for piece in pieces:
        if found and sum(len(each.weight) for each in found) + len(piece.weight) > AT_ONCE:
            yield found
            found = []
        found.append(piece)
    if found:
        yield found


def _read(stored: Tensor, scale: Tensor | None, *, signed: bool) -> Tensor:
    """The values in fp32; what is stored itself where it has them."""
    if scale is None:
        return stored.float() if stored.dtype == torch.bfloat16 else stored
    from torchao.optim.quant_utils import dequant_with_qmap  # pyright: ignore[reportMissingImports]

    return dequant_with_qmap(stored, _codes(signed, stored.device), scale)


def _write(stored: Tensor, scale: Tensor | None, value: Tensor, skipped: Tensor | None, *, signed: bool) -> None:
    """Rounds values to what can be stored; a skipped step changes no bit."""
    if value.data_ptr() == stored.data_ptr():
        return
    rounded = [(stored, value.to(stored.dtype))] if scale is None else _quantized(stored, scale, value, signed)
    for old, new in rounded:
        old.copy_(new if skipped is None else torch.where(skipped.to(old.device) > 0, old, new))


def _quantized(stored: Tensor, scale: Tensor, value: Tensor, signed: bool) -> list[tuple[Tensor, Tensor]]:
    from torchao.optim.quant_utils import (  # pyright: ignore[reportMissingImports]
        quantize_8bit_with_qmap,
        scale_tensor,
    )

    scaled, scales = scale_tensor(value, len(stored) // len(scale))
    codes = quantize_8bit_with_qmap(scaled, _codes(signed, stored.device))
    # A mean square of zero beside a mean that is not would make a step of mean / eps.
    return [(stored, codes if signed else codes.clamp(min=1)), (scale, scales)]


@lru_cache(maxsize=8)
def _codes(signed: bool, device: torch.device) -> Tensor:
    """What each code stands for, (256,) from -1 or 0 to 1."""
    from torchao.optim.quant_utils import create_dynamic_map  # pyright: ignore[reportMissingImports]

    return torch.tensor(create_dynamic_map(signed=signed), dtype=torch.float32, device=device)
