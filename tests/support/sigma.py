"""Matrices and spectrally normalised maps of known values."""

import torch
from torch import Tensor

from stablelm.methods import spectral
from stablelm.methods.sigma_reparam import Sigma
from stablelm.model.linear import Linear, derive, make_dtypes


def gaussian(*shape: int, seed: int = 0, std: float = 0.02) -> Tensor:
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectral_norm(matrix: Tensor) -> float:
    return torch.linalg.svdvals(matrix.double())[0].item()


def make_linear(d_out: int, d_in: int, *, precision: str = "fp64", bias: bool = True, gamma: float = 1.7) -> Linear:
    """Weights of known values whose u and v, W^T v, are a few iterations away from the singular vectors."""
    linear = Linear(d_in, d_out, bias=bias, dtypes=make_dtypes(precision, "fp32"), reparam=Sigma())
    weight = gaussian(d_out, d_in)
    v = spectral.start(weight + 0.3 * gaussian(d_out, d_in, seed=1)).v
    u = torch.nn.functional.normalize(weight.T @ v, dim=0)
    with torch.no_grad():
        for tensor, value in ((linear.weight, weight), (linear.u, u), (linear.v, v)):
            tensor.copy_(value)
        linear.gamma.fill_(gamma)
        if linear.bias is not None:
            linear.bias.copy_(gaussian(d_out, seed=2))
    derive(linear)
    return linear


def make_matrix(linear: Linear) -> spectral.Matrix:
    return spectral.whole(linear)
