"""Several maps by one product: the same values and gradients as map by map from plain operations."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.sigma import gaussian, make_linear
from torch import Tensor

from stablelm.methods.axes import Reparam
from stablelm.methods.kernels import weighted_sum
from stablelm.model.linear import Linear, LowRankLinear, make_dtypes, side_by_side
from stablelm.model.products import Vectors, one_matrix


class RowLengths(Reparam):
    """Rows of length `size`: a factor of a form that only autograd knows."""

    def parameters(self, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
        return {"size": (d_out,)}

    def factor(self, linear: Any) -> Tensor:
        return linear.size / linear.weight.norm(dim=1)


def _maps(kind: str, precision: str) -> list[Linear | LowRankLinear]:
    if kind == "sigma":
        return [make_linear(d_out, 16, precision=precision, gamma=0.5 + d_out) for d_out in (12, 4, 8)]
    dtypes = make_dtypes(precision, "fp32")
    made = [
        LowRankLinear(16, 3, d_out, bias=True, dtypes=dtypes)
        if kind == "low rank"
        else Linear(16, d_out, bias=True, dtypes=dtypes, reparam=RowLengths() if kind == "rows" else None)
        for d_out in (12, 4, 8)
    ]
    with torch.no_grad():
        for seed, parameter in enumerate(p for part in made for p in part.parameters()):
            parameter.copy_(gaussian(*parameter.shape, seed=seed))
    return made


def _plain(linear: Linear | LowRankLinear, x: Tensor, leaves: dict[Tensor, Tensor]) -> Tensor:
    if isinstance(linear, LowRankLinear):
        return _plain(linear.up, _plain(linear.down, x, leaves), leaves)
    weight, factor = leaves[linear.weight], 1.0
    if linear.reparam is not None:
        own = {name: leaves.get(value, value) for name, value in (linear._parameters | linear._buffers).items()}  # type: ignore[arg-type]
        rows = linear.reparam.factor(SimpleNamespace(**own))
        assert rows is not None
        factor = rows[:, None]
    y = x @ (factor * weight).T
    return y if linear.bias is None else y + leaves[linear.bias]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-12), ("fp32", 1e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("kind", ["plain", "sigma", "rows", "low rank"])
def test_values_and_gradients_are_those_of_each_map(kind: str, precision: str, tolerance: float):
    maps = _maps(kind, precision)
    parameters = [parameter for part in maps for parameter in part.parameters()]
    leaves: dict[Any, Tensor] = {parameter: parameter.detach().double().requires_grad_() for parameter in parameters}
    buffers = {buffer: buffer.double() for part in maps for buffer in part.buffers()}
    x, back = gaussian(3, 5, 16, seed=8, std=1), gaussian(3, 5, 24, seed=9, std=1)
    ours = x.to(parameters[0].dtype).requires_grad_()
    x.requires_grad_()
    found = side_by_side(maps, ours)
    wanted = torch.cat([_plain(linear, x, leaves | buffers) for linear in maps], dim=-1)
    found.backward(back.to(found.dtype))
    wanted.backward(back)
    pairs = [(found, wanted), (ours.grad, x.grad), *((p.grad, leaves[p].grad) for p in parameters)]
    for mine, plain in pairs:
        assert mine is not None and plain is not None
        assert (mine - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("kind", ["alone", "gains", "gains of rows", "norms"])
@pytest.mark.parametrize(
    ("weights", "others", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.bfloat16, 0.03),
        (torch.bfloat16, torch.float32, 0.03),
    ],
)
def test_one_matrix_and_its_gradients_in_the_precision_of_each_part(kind: str, weights, others, tolerance: float):
    """Engines that shard weights in bf16 keep norms, and some gains, in fp32."""
    sizes = (12, 4)
    made = [gaussian(n, 16, seed=n, std=1).to(weights).requires_grad_() for n in sizes]
    lengths = () if kind == "alone" else sizes if kind == "gains of rows" else (1, 1)
    gains = [gaussian(n, seed=20 + n, std=1).to(others).requires_grad_() for n in lengths]
    directions = [
        (gaussian(n, seed=30 + n, std=0.3).to(others), gaussian(16, seed=40 + n, std=0.3).to(others)) for n in sizes
    ]
    norms = [
        Vectors((v.double() @ w.detach().double() @ u.double())[None].to(others), v, u)
        for w, (v, u) in zip(made, directions, strict=True)
    ]
    columns = gaussian(16, seed=50, std=1).to(weights).requires_grad_()
    vectors = norms if kind == "norms" else ()
    found = one_matrix(made, gains, vectors, weights, columns, 20)
    leaves = [leaf.detach().double().requires_grad_() for leaf in (*made, *gains, columns)]
    rows = [leaf[:, None] for leaf in leaves[2:-1]] or [torch.ones(1, 1, dtype=torch.float64)] * 2
    if vectors:
        rows = [
            row / (own.v.double() @ leaf @ own.u.double()) for row, leaf, own in zip(rows, leaves, norms, strict=False)
        ]
    wanted = torch.cat([row * leaf * leaves[-1] for row, leaf in zip(rows, leaves, strict=False)])
    back = gaussian(16, 20, seed=60, std=1)
    found.backward(back.to(weights))
    wanted.backward(back[:, :16])
    assert not found[:, 16:].any()
    for mine, plain in (
        (found[:, :16], wanted),
        *((a.grad, b.grad) for a, b in zip((*made, *gains, columns), leaves, strict=True)),
    ):
        assert mine is not None and plain is not None
        assert (mine - plain).norm() <= tolerance * plain.norm()


def test_a_gain_of_zero_still_has_its_gradient():
    linear = make_linear(6, 5, gamma=0.0, bias=False)
    x, back = gaussian(7, 5, seed=4, std=1), gaussian(7, 6, seed=5, std=1)
    linear(x).backward(back)
    sigma = linear.v @ linear.weight.detach() @ linear.u
    wanted = ((back.T @ x) * linear.weight.detach()).sum() / sigma
    torch.testing.assert_close(linear.gamma.grad, wanted[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("skip", "gain"), [(1.0, 1.0), (0.9, 0.4), (1.0, 0.5)])
def test_a_weighted_sum_and_its_gradients(skip: float, gain: float):
    x, branch = (gaussian(2, 3, 4, seed=seed, std=1).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda x, branch: weighted_sum(x, branch, skip, gain), (x, branch))
    torch.testing.assert_close(weighted_sum(x, branch, skip, gain), skip * x + gain * branch)
    low = branch.detach().bfloat16()
    mixed = weighted_sum(x.detach().float(), low, skip, gain)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, skip * x.detach().float() + gain * low.float())
