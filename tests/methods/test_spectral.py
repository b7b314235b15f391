"""Spectral norms: their start, how one refresh a step follows them, and the same from shards."""

import math
import threading
from itertools import chain

import pytest
import torch
from support.sigma import gaussian, make_linear, make_matrix, spectral_norm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablelm.methods import spectral

# The start.

SHAPES = [(256, 256), (768, 768), (3072, 768), (96, 300), (1, 7), (7, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_start_is_the_top_of_the_svd(shape):
    weight = gaussian(*shape)
    torch.manual_seed(5)  # the global generator plays no part
    start, again = spectral.start(weight.float()), spectral.start(weight.float())
    weight = weight.float().double()
    assert start.sigma == again.sigma and torch.equal(start.u, again.u) and torch.equal(start.v, again.v)
    assert start.sigma == pytest.approx(spectral_norm(weight), rel=1e-7)
    assert (start.u.norm().item(), start.v.norm().item()) == pytest.approx((1, 1), abs=1e-12)
    assert (weight.T @ start.v - start.sigma * start.u).norm() <= 1e-4 * start.sigma
    assert (start.v @ weight @ start.u).item() == pytest.approx(start.sigma, rel=1e-7)
    if min(shape) >= 256:
        expected = 0.02 * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
        assert start.sigma == pytest.approx(expected, rel=0.02)


def test_starts_shared_out_over_ranks_sum_to_all_of_them():
    matrices = [gaussian(rows, 20, seed=rows) for rows in (12, 30, 20, 8, 16)]
    ranks = [spectral.SharedStarts(rank, 3) for rank in range(3)]
    for matrix in matrices:
        parts, whole = [rank(matrix) for rank in ranks], spectral.start(matrix)
        assert sum(part.sigma > 0 for part in parts) == 1
        assert sum(part.sigma for part in parts) == whole.sigma
        assert torch.equal(sum(part.u for part in parts), whole.u)  # type: ignore[arg-type]
        assert torch.equal(sum(part.v for part in parts), whole.v)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [100, 400])
def test_the_start_of_special_matrices(size):
    rank_one = torch.outer(gaussian(size, std=1), gaussian(size, seed=1, std=1))
    assert spectral.start(rank_one).sigma == pytest.approx(spectral_norm(rank_one), rel=1e-9)
    assert spectral.start(3.0 * torch.eye(size)).sigma == pytest.approx(3, rel=1e-9)
    with pytest.raises(ValueError, match="no direction of largest gain"):
        spectral.start(torch.zeros(size, size))


# Tracking.


@pytest.mark.parametrize(("lr", "shortfall"), [(3e-4, 1e-3), (1e-3, 2.5e-2)])
def test_one_refresh_a_step_follows_the_norm_from_below(lr, shortfall):
    """Sign steps with gradients of noise: the hardest case for one power iteration a step."""
    weight = gaussian(256, 256).float()
    start = spectral.start(weight)
    matrix = spectral.Matrix(weight, 0, start.u.float(), start.v.float(), torch.empty(1))
    spectral.find_sigma([matrix])
    generator, ratios = torch.Generator().manual_seed(1), [spectral_norm(weight) / matrix.sigma.item()]
    for step in range(1, 301):
        weight -= lr * torch.randn(256, 256, generator=generator).sign()
        spectral.refresh([matrix])
        if step % 30 == 0:
            ratios.append(spectral_norm(weight) / matrix.sigma.item())
    assert ratios[0] <= 1 + 1e-4
    assert min(ratios) >= 1 - 1e-5
    assert max(ratios) <= 1 + shortfall


def test_tracking_errors_tell_how_far_the_estimate_lies_below_and_change_nothing():
    matrices = [make_matrix(make_linear(24, 16)), make_matrix(make_linear(16, 40))]
    kept = [[vector.clone() for vector in (m.u, m.v, m.sigma)] for m in matrices]
    errors = spectral.tracking_errors(matrices, iterations=500)
    wanted = [1 - (m.v @ m.rows @ m.u).item() / spectral_norm(m.rows) for m in matrices]
    assert min(wanted) > 1e-4
    assert errors.tolist() == pytest.approx(wanted, rel=1e-6)
    for m, vectors in zip(matrices, kept, strict=True):
        assert all(map(torch.equal, (m.u, m.v, m.sigma), vectors))


class _Ranks:
    """Threads that stand for ranks: a sum of flat tensors over all of them, counted."""

    def __init__(self, size: int):
        self.barrier, self.parts, self.calls = threading.Barrier(size), [torch.empty(0)] * size, 0

    def reduce(self, rank: int):
        def in_place(flat: Tensor) -> None:
            self.parts[rank] = flat.clone()
            self.calls += rank == 0
            self.barrier.wait(10)
            flat.copy_(torch.stack(self.parts).sum(dim=0))
            self.barrier.wait(10)

        return in_place

    def run(self, function, *each: list) -> list:
        results: list = [None] * len(self.parts)

        def one(rank: int) -> None:
            results[rank] = function(*(arguments[rank] for arguments in each), self.reduce(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.fixture(params=[0, 24 * 40 * 8 * 2], ids=["alone", "stacked"])
def stacked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many bytes of matrices are multiplied together, as on a GPU."""
    monkeypatch.setitem(spectral.STACKED_BYTES, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("splits", [(13, 11), (8, 8, 8), (20, 4, 0)], ids=str)
def test_a_refresh_of_rows_equals_that_of_the_whole_in_two_sums(splits):
    whole = [make_matrix(make_linear(24, 16)), make_matrix(make_linear(24, 40))]
    shards = []
    for rank in range(len(splits)):
        first = sum(splits[:rank])
        rows = slice(first, first + splits[rank])
        shards.append([m._replace(rows=m.rows[rows], first_row=first, **vectors_of(m)) for m in whole])
    ranks = _Ranks(len(splits))
    ranks.run(spectral.refresh, shards)
    assert ranks.calls == 2
    spectral.refresh(whole)
    for rank, held in enumerate(shards):
        for one, other in zip(held, whole, strict=True):
            assert_same_vectors(one, other)
            if 0 < splits[rank] < 20:
                assert (
                    spectral_norm(one.rows) < 0.99 * (one.v @ other.rows @ one.u).item()
                )  # a shard's own norm would not do
    assert_sigma_is_found_again(ranks, shards)
    assert ranks.calls == 3


def vectors_of(matrix: spectral.Part) -> dict[str, Tensor]:
    return {"u": matrix.u.clone(), "v": matrix.v.clone(), "sigma": matrix.sigma.clone()}


def own_vectors(matrix: spectral.Part) -> list[Tensor]:
    return list(vectors_of(matrix).values())


def assert_same_vectors(one: spectral.Part, other: spectral.Part) -> None:
    for mine, vector in zip(own_vectors(one), own_vectors(other), strict=True):
        torch.testing.assert_close(mine, vector, rtol=1e-12, atol=1e-14)


def assert_sigma_is_found_again(ranks: _Ranks, shards: list) -> None:
    """As after a checkpoint was loaded: the bits that the refresh left, on every rank."""
    left = [part.sigma.clone() for part in shards[0]]
    for part in chain(*shards):
        part.sigma.fill_(torch.nan)
    ranks.run(spectral.find_sigma, shards)
    for held in shards:
        assert all(torch.equal(part.sigma, sigma) for part, sigma in zip(held, left, strict=True))


def several_layers(layers: int) -> list[spectral.Matrix]:
    """Matrices of two shapes in turn, each of other values."""
    shapes = [(24, 16), (24, 40), (24, 16)] * layers
    found = [make_matrix(make_linear(*shape)) for shape in shapes]
    for seed, matrix in enumerate(found):
        matrix.rows.add_(gaussian(*matrix.rows.shape, seed=seed))
    return found


@pytest.mark.usefixtures("stacked")
def test_every_matrix_is_refreshed_by_its_own_values():
    matrices = several_layers(3)
    wanted = []
    for rows, u in ((matrix.rows, matrix.u) for matrix in matrices):
        v = rows @ u / (rows @ u).norm()
        wanted.append((rows.T @ v / (rows.T @ v).norm(), v))
    squares = spectral.squared_rows(matrices)
    spectral.refresh(matrices)
    for matrix, (u, v), square in zip(matrices, wanted, squares, strict=True):
        torch.testing.assert_close(matrix.u, u, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(matrix.v, v, rtol=1e-12, atol=1e-14)
        assert matrix.sigma.item() == pytest.approx((v @ matrix.rows @ u).item(), rel=1e-12)
        torch.testing.assert_close(square, matrix.rows.square().sum(dim=1), rtol=1e-12, atol=0)


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("ends", [(0.3, 1), (0.01, 0.32, 1), (0.5, 1, 1)], ids=str)
def test_a_refresh_of_flat_ranges_equals_that_of_the_whole_in_two_sums(ends):
    """Ranges that begin and end within rows, as ZeRO-3 cuts a matrix; the last rank may have none."""
    whole = several_layers(2)
    shards, begin = [], 0.0
    for end in ends:
        cuts = [(int(begin * m.rows.numel()), int(end * m.rows.numel())) for m in whole]
        held = [m.rows.flatten()[start:stop] for m, (start, stop) in zip(whole, cuts, strict=True)]
        parts = zip(held, cuts, whole, strict=True)
        shards.append([spectral.Slice(values, start, **vectors_of(m)) for values, (start, _), m in parts])
        begin = end
    ranks = _Ranks(len(ends))
    squares = ranks.run(spectral.squared_rows, shards)
    assert ranks.calls == 1
    ranks.run(spectral.refresh, shards)
    assert ranks.calls == 3
    spectral.refresh(whole)
    for held, lengths in zip(shards, squares, strict=True):
        for one, other, length in zip(held, whole, lengths, strict=True):
            assert_same_vectors(one, other)
            torch.testing.assert_close(length, other.rows.square().sum(dim=1), rtol=1e-12, atol=0)
    assert_sigma_is_found_again(ranks, shards)
    assert ranks.calls == 4


@pytest.mark.usefixtures("stacked")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigma_of_whole_matrices_is_found_again_to_the_bit(dtype: torch.dtype):
    matrices = [
        spectral.Matrix(m.rows.to(dtype), 0, m.u.to(dtype), m.v.to(dtype), m.sigma.to(dtype)) for m in several_layers(3)
    ]
    for _ in range(3):
        spectral.refresh(matrices)
        left = [m.sigma.clone() for m in matrices]
        spectral.find_sigma(matrices)
        assert all(torch.equal(m.sigma, sigma) for m, sigma in zip(matrices, left, strict=True))


class _Launches(TorchDispatchMode):
    """Counts the operations that compute, and the elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ != "_unsafe_view":
            self.count += 1
            self.largest = max(
                [self.largest, *(each.numel() for each in tree_leaves(found) if isinstance(each, Tensor))]
            )
        return found


def test_a_gpu_launches_by_shape_and_copies_a_few_matrices_at_a_time(monkeypatch: pytest.MonkeyPatch):
    counts, largest = [], 0
    monkeypatch.setitem(spectral.STACKED_BYTES, "cpu", 10 * 24 * 40 * 8)
    for layers in (4, 6, 40):
        several = several_layers(layers)
        with _Launches() as seen:
            spectral.refresh(several)
        counts.append(seen.count)
        largest = max(largest, seen.largest)
    assert counts[0] == counts[1] <= 2 * 14 + 1
    assert counts[2] <= counts[0] + 5 * (40 // 10 + 80 // 25)  # five for each further copy
    assert largest == 10 * 24 * 40 < sum(matrix.rows.numel() for matrix in several) / 5


def test_nothing_to_refresh_asks_for_no_sum():
    spectral.refresh([], lambda flat: pytest.fail("no collective is needed"))
