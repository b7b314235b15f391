"""Cross-entropy that never holds all logits: gradients are taken chunk by chunk in the forward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelm.model.targets import IGNORED
from stablelm.model.token_loss import TokenLoss

CHUNK_BYTES = 32 * 2**20


class LossSums(NamedTuple):
    """Sums over the valid targets of a micro-batch, 0-dim, fp32 (fp64 under fp64); divide by a global count.

    `total`: objective + z_loss * log(Z)^2, differentiable; `cross_entropy`: in nats, detached; `valid`: how many
    targets count (int64); `objective`: what is minimised, detached: the cross-entropy, or the user's own loss.
    """

    total: Tensor
    cross_entropy: Tensor
    valid: Tensor
    objective: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    token_loss: TokenLoss | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> LossSums:
    """The loss of logits hidden weight^T without keeping them.

    hidden: (n, d) in the compute dtype; weight: (vocab, d) in the parameter dtype; targets: (n,) int64, -100 =
    ignored; `chunk_bytes` bounds the logits held at once. Matrix products run in hidden's dtype, softmax and
    sums in weight's. The gradients are computed here and only scaled in the backward pass, in place, so that
    `total` can be differentiated once. z-loss: Chowdhery et al. 2022, section 5. `token_loss` takes the cross-entropy's
    place in `total` where gradients are taken; it may keep a few times `chunk_bytes`.
    """
    grad = torch.is_grad_enabled()
    total, cross_entropy, *objective = _ChunkedCrossEntropy.apply(
        hidden, weight, targets, z_loss, token_loss if grad else None, chunk_bytes, grad
    )
    return LossSums(total, cross_entropy, (targets != IGNORED).sum(), *objective or (cross_entropy,))


class TokenScores(NamedTuple):
    """Of each asked token (n,): log-probability in nats, in the parameter dtype, and whether no token is likelier."""

    log_probability: Tensor
    greedy: Tensor


def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> TokenScores:
    """Scores of targets (n,) int64 after hidden (n, d), under the softmax that the loss uses: over all rows of weight.

    Matrix products run in hidden's dtype, the softmax in weight's (vocab, d). Without gradients.
    """
    n, vocab = hidden.shape[0], weight.shape[0]
    rows = max(1, chunk_bytes // (vocab * weight.element_size()))
    scores, greedy = weight.new_zeros(n), torch.zeros(n, dtype=torch.bool, device=weight.device)
    with torch.no_grad():
        matrix = weight.to(hidden.dtype)
        for start in range(0, n, rows):
            part = slice(start, start + rows)
            x = hidden[part]
            logits = _product(x, matrix, weight.new_empty(x.shape[0], vocab))
            chosen = logits.gather(1, targets[part, None]).squeeze(1)
            greedy[part] = logits.argmax(dim=1) == targets[part]
            scores[part] = chosen - logits.logsumexp(dim=1)
    return TokenScores(scores, greedy)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        token_loss: TokenLoss | None,
        chunk_bytes: int,
        grad: bool,
    ):
        grad_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if grad and ctx.needs_input_grad[1] else None
        n, vocab = hidden.shape[0], weight.shape[0]
        rows = max(1, min(n, chunk_bytes // (vocab * weight.element_size())))
        matrix = weight.to(hidden.dtype)
        logits = weight.new_empty(rows, vocab)
        own = token_loss is not None
        losses = weight.new_zeros(2 + own, n)  # cross-entropy and log(Z)^2 of each token, and its own loss
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            x = hidden[part]
            chunk = _product(x, matrix, logits[: x.shape[0]])
            added = None
            if token_loss is not None:
                losses[2, part], added = token_loss.with_slopes(chunk, targets[part], targets[part] != IGNORED)
            _losses_and_slopes(chunk, targets[part], z_loss, losses[:2, part], grad, cross_entropy=not own)
            slopes = (chunk if added is None else chunk.add_(added)).to(x.dtype)
            if grad_hidden is not None:
                torch.mm(slopes, matrix, out=grad_hidden[part])
            if grad_weight is not None:
                _accumulate(grad_weight, slopes, x)
        ctx.grads = (grad_hidden, grad_weight)
        cross_entropy, z, *objective = losses.sum(dim=1)
        ctx.mark_non_differentiable(cross_entropy, *objective)
        return (*objective, cross_entropy)[0] + z_loss * z, cross_entropy, *objective

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.grads is not None, "the chunked loss can be differentiated once"
        grads, ctx.grads = ctx.grads, None
        scaled = (None if grad is None else grad.mul_(grad_total) for grad in grads)
        return *scaled, None, None, None, None, None


def _product(x: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """x matrix^T into `out`, whose dtype is at least that of x."""
    if x.dtype == out.dtype:
        return torch.mm(x, matrix.t(), out=out)
    return out.copy_(torch.mm(x, matrix.t()))


def _accumulate(total: Tensor, slopes: Tensor, x: Tensor) -> None:
    """total += slopes^T x, added up in total's dtype."""
    if x.dtype == total.dtype:
        torch.addmm(total, slopes.t(), x, out=total)
    else:
        total.add_(torch.mm(slopes.t(), x))


def _losses_and_slopes(
    logits: Tensor, targets: Tensor, z_loss: float, losses: Tensor, slopes: bool, *, cross_entropy: bool
) -> None:
    """Writes (cross-entropy, log(Z)^2) of each row into `losses` and, with `slopes`, d total/d logits into `logits`.

    logits: (rows, vocab), overwritten in any case; targets: (rows,); losses: (2, rows). Ignored rows get zeros.
    `cross_entropy`: whether it is part of the total.
    """
    valid = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    chosen = logits.gather(1, index).squeeze(1)
    largest = logits.amax(dim=1)
    powers = logits.sub_(largest[:, None]).exp_()
    sums = powers.sum(dim=1)
    log_z = sums.log() + largest
    losses[0] = torch.where(valid, log_z - chosen, 0)
    losses[1] = torch.where(valid, log_z.square(), 0)
    if slopes:
        # d(log Z)/d logits is the softmax, so z_loss log(Z)^2 adds 2 z_loss log(Z) softmax.
        powers.mul_(torch.where(valid, (cross_entropy + 2 * z_loss * log_z) / sums, 0)[:, None])
        if cross_entropy:
            powers.scatter_add_(1, index, -valid.to(logits.dtype)[:, None])
