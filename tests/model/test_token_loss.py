"""A loss of the user's own, chunk by chunk, against a float64 reference; and what it must not return."""

import pytest
import torch
import torch.nn.functional as F
from support.own_hooks import FOCUS, SMOOTHING
from torch import Tensor

from stablelm.errors import ConfigError
from stablelm.model.loss import chunked_cross_entropy
from stablelm.model.token_loss import TokenLoss, try_token_loss

N, D, VOCAB = 37, 12, 101


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    targets[[0, 5, 6, 36]] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def reference(name: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cross-entropy, sum of log(Z)^2) over the valid targets, written out from probabilities."""
    logits = (hidden @ weight.T)[targets != -100]
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    kept = targets[targets != -100]
    chosen = p[torch.arange(len(kept)), kept]
    if name == "focal":
        losses = -((1 - chosen) ** FOCUS) * chosen.log()
    else:
        wanted = (1 - SMOOTHING) * F.one_hot(kept, VOCAB).to(p.dtype) + SMOOTHING / VOCAB
        losses = -(wanted * p.log()).sum(dim=1)
    return losses.sum(), -chosen.log().sum(), logits.exp().sum(dim=1).log().square().sum()


@pytest.mark.parametrize("name", ["label_smoothing", "focal"])
@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_equals_a_float64_reference(name: str, rows: int, z_loss: float, dtype: torch.dtype, tolerance: float):
    hidden, weight, targets = inputs(dtype)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    objective, cross_entropy, z = reference(name, *exact, targets)
    wanted = torch.autograd.grad(0.3 * (objective + z_loss * z), exact)
    own, size = TokenLoss(f"support.own_hooks:{name}"), rows * VOCAB * dtype.itemsize
    sums = chunked_cross_entropy(hidden, weight, targets, z_loss=z_loss, token_loss=own, chunk_bytes=size)
    found = torch.autograd.grad(0.3 * sums.total, (hidden, weight))
    assert sums.total.item() == pytest.approx((objective + z_loss * z).item(), rel=tolerance)
    assert float(sums.objective) == pytest.approx(objective.item(), rel=tolerance)
    assert float(sums.cross_entropy) == pytest.approx(cross_entropy.item(), rel=tolerance)
    assert not sums.objective.requires_grad and not sums.cross_entropy.requires_grad
    for gradient, target in zip(found, wanted, strict=True):
        assert (gradient - target).norm() <= tolerance * target.norm()


def test_the_cross_entropy_written_out_is_the_built_in_one():
    hidden, weight, targets = inputs(torch.float64)
    built_in = chunked_cross_entropy(hidden, weight, targets, z_loss=0.1)
    own = chunked_cross_entropy(hidden, weight, targets, z_loss=0.1, token_loss=TokenLoss("support.own_hooks:plain"))
    assert torch.equal(built_in.objective, built_in.cross_entropy)
    for one, other in ((built_in.total, own.total), (built_in.cross_entropy, own.objective)):
        assert one.item() == pytest.approx(other.item(), rel=1e-13)
    expected, found = (torch.autograd.grad(each.total, (hidden, weight)) for each in (built_in, own))
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in zip(expected, found, strict=True))


def test_without_gradients_it_is_not_called():
    """Evaluation measures the cross-entropy."""
    with torch.no_grad():
        sums = chunked_cross_entropy(*inputs(torch.float32), token_loss=TokenLoss("support.own_hooks:fails"))
    assert torch.equal(sums.objective, sums.cross_entropy)


def test_padding_alone_has_no_loss_and_no_gradient():
    hidden, weight, targets = inputs(torch.float32)
    sums = chunked_cross_entropy(
        hidden, weight, torch.full_like(targets, -100), token_loss=TokenLoss("support.own_hooks:focal")
    )
    sums.total.backward()
    assert sums.total.item() == 0 and hidden.grad is not None and not hidden.grad.any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mean", "returns a tensor of shape (); return the loss of each of the 4 tokens"),
        ("as_list", "returns a list"),
        ("as_integers", "returns a tensor of torch.int64"),
        ("detached", "without a gradient to the logits"),
        ("infinite", "is not finite"),
        ("of_the_batch", "another loss beside other tokens"),
        ("fails", "failed with ValueError: no such class (own_hooks.py, line "),
        ("in_place", "failed with RuntimeError: a leaf Variable that requires grad"),
        ("alone", "failed with TypeError"),
        ("NUMBER", "is a int, not a function"),
    ],
)
def test_what_it_must_not_do_is_said_before_the_run(name: str, words: str):
    with pytest.raises(ConfigError) as found:
        try_token_loss(f"support.own_hooks:{name}", VOCAB)
    assert words in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["label_smoothing", "focal", "plain"])
def test_a_good_one_passes(name: str):
    try_token_loss(f"support.own_hooks:{name}", VOCAB)
