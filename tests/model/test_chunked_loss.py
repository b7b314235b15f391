"""The chunked loss against whole logits: values, gradients, masks, precision, memory."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from stablelm.model.loss import EXACT_BYTES, chunk_rows, chunked_cross_entropy

N, D, VOCAB = 37, 12, 101


def _inputs(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = scale * torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[[0, 5, 6, 36]] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def _whole(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    logits = hidden @ weight.T
    z = torch.logsumexp(logits[targets != -100], dim=-1).square().sum()
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100) + z_loss * z


def _rows(rows: int, dtype: torch.dtype = torch.float64) -> int:
    """The bytes of a chunk of that many rows."""
    return rows * VOCAB * dtype.itemsize


@pytest.mark.parametrize(("rows", "part"), [(1, 1), (5, 2), (36, 7), (37, 5), (37, 100), (1000, 1000)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_the_whole_loss_and_its_gradients(rows, part, z_loss, dtype, tolerance, monkeypatch):
    monkeypatch.setitem(EXACT_BYTES, "cpu", _rows(part, dtype) // torch.get_num_threads())
    hidden, weight, targets = _inputs(dtype)
    expected = _whole(hidden, weight, targets, z_loss)
    wanted = torch.autograd.grad(0.3 * expected, (hidden, weight))
    sums = chunked_cross_entropy(hidden, weight, targets, z_loss=z_loss, chunk_bytes=_rows(rows, dtype))
    gradients = torch.autograd.grad(0.3 * sums.total, (hidden, weight))
    assert sums.total.item() == pytest.approx(expected.item(), rel=tolerance)
    assert sums.cross_entropy.item() == pytest.approx(_whole(hidden, weight, targets, 0).item(), rel=tolerance)
    assert not sums.cross_entropy.requires_grad
    assert sums.valid.item() == N - 4
    for gradient, target in zip(gradients, wanted, strict=True):
        assert (gradient - target).norm() <= tolerance * target.norm()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_it_is_the_same(dtype):
    hidden, weight, targets = _inputs(torch.float64 if dtype == torch.float64 else torch.float32)
    hidden, found = hidden.detach().to(dtype).requires_grad_(), []
    for compiled in (False, True):
        sums = chunked_cross_entropy(
            hidden, weight, targets, z_loss=0.01, chunk_bytes=_rows(15, dtype), compiled=compiled
        )
        found.append((sums.total, sums.cross_entropy, *torch.autograd.grad(sums.total, (hidden, weight))))
        with torch.no_grad():
            scored = chunked_cross_entropy(hidden, weight, targets, compiled=compiled)
        assert scored.cross_entropy.item() == pytest.approx(sums.cross_entropy.item(), rel=1e-6)
    for one, other in zip(*found, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 1e-2 if one.ndim else 1e-6
        assert (one - other).norm() <= tolerance * one.norm()


def test_a_weight_gathered_in_bf16_has_its_softmax_and_sums_in_fp32():
    hidden, weight, targets = _inputs(torch.float32)
    hidden, weight = (each.detach().bfloat16().requires_grad_() for each in (hidden, weight))
    expected = _whole(hidden.float(), weight.float(), targets, 0.01)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    sums = chunked_cross_entropy(hidden, weight, targets, z_loss=0.01, chunk_bytes=_rows(7, torch.bfloat16))
    assert sums.total.dtype == torch.float32
    assert sums.total.item() == pytest.approx(expected.item(), rel=5e-3)
    for gradient, target in zip(torch.autograd.grad(sums.total, (hidden, weight)), wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.float() - target.float()).norm() <= 0.02 * target.float().norm()


@pytest.mark.parametrize(
    ("vocab", "dtype", "device", "rows"),
    [
        (32000, torch.bfloat16, "cuda", 4096),
        (128256, torch.bfloat16, "cuda", 4096),
        (262144, torch.bfloat16, "cuda", 2048),
        (32000, torch.bfloat16, "cpu", 1048),
        (32000, torch.float32, "cpu", 524),
        (10**9, torch.float32, "cpu", 1),
    ],
)
def test_rows_of_a_chunk(vocab, dtype, device, rows):
    assert chunk_rows(vocab, dtype, device) == rows


def test_the_chunk_size_does_not_change_the_loss_of_a_token():
    hidden, weight, targets = _inputs(torch.float32)
    whole = chunked_cross_entropy(hidden, weight, targets)
    for rows in (1, 8, 20):
        parts = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=_rows(rows, torch.float32))
        assert parts.cross_entropy.item() == pytest.approx(whole.cross_entropy.item(), rel=1e-6)


def test_large_logits_stay_finite():
    hidden, weight, targets = _inputs(torch.float32, scale=1e4)
    sums = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=_rows(4, torch.float32))
    sums.total.backward()
    assert sums.total.item() == pytest.approx(_whole(hidden, weight, targets, 0).item(), rel=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_no_valid_target_gives_zero_loss_and_zero_gradients():
    hidden, weight, targets = _inputs(torch.float32)
    sums = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), z_loss=0.1)
    sums.total.backward()
    assert (sums.total.item(), sums.cross_entropy.item(), sums.valid.item()) == (0, 0, 0)
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_no_tokens_give_zero_loss_and_zero_gradients():
    hidden, weight, targets = _inputs(torch.float32)
    hidden = hidden.detach()[:0].requires_grad_()
    sums = chunked_cross_entropy(hidden, weight, targets[:0])
    found, _ = torch.autograd.grad(sums.total, (weight, hidden))
    assert (sums.total.item(), sums.valid.item(), found.abs().max().item()) == (0, 0, 0)


def test_ignored_rows_get_no_gradient():
    hidden, weight, targets = _inputs()
    chunked_cross_entropy(hidden, weight, targets, z_loss=0.1).total.backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.any(dim=1), targets != -100)


def test_bf16_is_near_fp32_and_sums_in_fp32():
    hidden, weight, targets = _inputs(torch.float32)
    exact = torch.autograd.grad(_whole(hidden, weight, targets, 0.01), (hidden, weight))
    rounded_hidden = hidden.detach().bfloat16().requires_grad_()
    sums = chunked_cross_entropy(rounded_hidden, weight, targets, z_loss=0.01, chunk_bytes=_rows(7, torch.float32))
    gradients = torch.autograd.grad(sums.total, (rounded_hidden, weight))
    assert sums.total.dtype == torch.float32
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32]
    assert sums.total.item() == pytest.approx(_whole(hidden, weight, targets, 0.01).item(), rel=5e-3)
    for gradient, target in zip(gradients, exact, strict=True):
        assert 0 < (gradient.float() - target).norm() <= 0.02 * target.norm()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient(frozen):
    inputs = list(_inputs())
    inputs[frozen] = inputs[frozen].detach()
    chunked_cross_entropy(*inputs).total.backward()
    assert inputs[frozen].grad is None
    assert inputs[1 - frozen].grad is not None


def test_equal_inside_a_checkpoint():
    hidden, weight, targets = _inputs()
    direct = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets).total, (hidden, weight))
    again = checkpoint(lambda h, w: chunked_cross_entropy(h * 1, w, targets).total, hidden, weight, use_reentrant=False)
    for gradient, expected in zip(torch.autograd.grad(again, (hidden, weight)), direct, strict=True):
        assert torch.equal(gradient, expected)


def test_a_second_backward_is_refused():
    hidden, weight, targets = _inputs()
    total = chunked_cross_entropy(hidden, weight, targets).total
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="once"):
        total.backward()


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns, and the calls of mm."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_or_the_weight():
    hidden, weight, targets = _inputs()
    with _LargestTensor() as seen:
        chunked_cross_entropy(hidden, weight, targets, chunk_bytes=_rows(6)).total.backward()
    assert seen.elements == max(6 * VOCAB, VOCAB * D)
    with _LargestTensor() as seen:
        _whole(hidden, weight, targets, 0).backward()
    assert seen.elements == N * VOCAB


def test_without_gradients_only_logits_are_computed():
    hidden, weight, targets = _inputs()
    with torch.no_grad(), _LargestTensor() as seen:
        sums = chunked_cross_entropy(hidden, weight, targets, chunk_bytes=_rows(10))
    assert seen.products == 4
    assert not sums.total.requires_grad
    assert torch.equal(sums.total, chunked_cross_entropy(hidden, weight, targets, chunk_bytes=_rows(10)).total)
