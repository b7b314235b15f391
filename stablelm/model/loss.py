"""Cross-entropy that never holds all logits: gradients are taken chunk by chunk in the forward pass."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stablelm.model.targets import IGNORED
from stablelm.model.token_loss import TokenLoss

CHUNK_BYTES = 64 * 2**20
"""Logits in the compute dtype that are held at once on a CPU."""
GPU_ROWS, GPU_CHUNK_BYTES = 4096, 2**30
"""Tokens of a chunk on a GPU, fewer where their logits in the compute dtype exceed so many bytes."""
EXACT_BYTES = {"cpu": 2**20, "cuda": 128 * 2**20}
"""Logits that the softmax has in the parameter dtype at once: for each thread of a CPU, where they stay in its cache;
on a GPU."""


class LossSums(NamedTuple):
    """Sums over the valid targets of a micro-batch, 0-dim, fp32 (fp64 under fp64); divide by a global count.

    `total`: objective + z_loss * log(Z)^2, differentiable; `cross_entropy`: in nats, detached; `valid`: how many
    targets count (int64); `objective`: what is minimised, detached: the cross-entropy, or the user's own loss; `each`:
    the cross-entropy of every target, (n,), 0 where it is ignored; (0,) where gradients are taken.
    """

    total: Tensor
    cross_entropy: Tensor
    valid: Tensor
    objective: Tensor
    each: Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    token_loss: TokenLoss | None = None,
    chunk_bytes: int | None = None,
    compiled: bool = False,
) -> LossSums:
    """The loss of logits hidden weight^T without keeping them.

    hidden: (n, d) in the compute dtype; weight: (vocab, d) in the parameter dtype; targets: (n,) int64, -100 =
    ignored; `chunk_bytes` bounds the logits held at once, in hidden's dtype (None: `chunk_rows` of them). Matrix
    products run in hidden's dtype, softmax and sums in weight's, of `EXACT_BYTES` of logits at a time. The gradients
    are computed here and only scaled in the backward pass, in place, so that `total` can be differentiated once.
    z-loss: Chowdhery et al. 2022, section 5. `token_loss` takes the cross-entropy's place in `total` where gradients
    are taken; it may keep a few times `EXACT_BYTES`. `compiled`: what follows the logits is one graph of torch.compile,
    which on a GPU reads and writes a chunk in its own dtype only; Liger's fused kernel keeps no more, and is not used.
    """
    grad = torch.is_grad_enabled()
    total, cross_entropy, each, *objective = _ChunkedCrossEntropy.apply(
        hidden, weight, targets, z_loss, token_loss if grad else None, chunk_bytes, compiled, grad
    )
    own = objective[0] if objective else cross_entropy
    return LossSums(total, cross_entropy, (targets != IGNORED).sum(), own, each)


class TokenScores(NamedTuple):
    """Of each asked token (n,): log-probability in nats, in the parameter dtype, and whether no token is likelier."""

    log_probability: Tensor
    greedy: Tensor


def token_scores(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_bytes: int | None = None) -> TokenScores:
    """Scores of targets (n,) int64 after hidden (n, d), under the softmax that the loss uses: over all rows of weight.

    Matrix products run in hidden's dtype, the softmax in weight's (vocab, d). Without gradients.
    """
    exact = _exact(weight)
    scores = weight.new_zeros(len(hidden), dtype=exact)
    greedy = torch.zeros(len(hidden), dtype=torch.bool, device=weight.device)
    with torch.no_grad():
        matrix = weight.to(hidden.dtype)
        for places, chunk in _chunks(hidden, matrix, chunk_bytes):
            for part, logits in _parts(places, chunk, exact):
                logits = logits.to(exact)
                chosen = logits.gather(1, targets[part, None]).squeeze(1)
                greedy[part] = logits.argmax(dim=1) == targets[part]
                scores[part] = chosen - logits.logsumexp(dim=1)
    return TokenScores(scores, greedy)


def drawn_tokens(hidden: Tensor, weight: Tensor, draws: Tensor) -> Tensor:
    """Tokens (n,) int64 of the softmax after hidden (n, d): the inverse of its cumulative sum at draws (n,) in [0, 1).

    Without gradients; the softmax and its sums are in weight's dtype (vocab, d).
    """
    exact = _exact(weight)
    found = torch.zeros(len(hidden), dtype=torch.int64, device=weight.device)
    with torch.no_grad():
        for places, chunk in _chunks(hidden, weight.to(hidden.dtype), None):
            for part, logits in _parts(places, chunk, exact):
                sums = logits.to(exact).softmax(dim=1).cumsum(dim=1)
                wanted = draws[part].to(exact) * sums[:, -1]
                found[part] = torch.searchsorted(sums, wanted[:, None], right=True).squeeze(1)
    return found.clamp_(max=len(weight) - 1)


def chunk_rows(vocab: int, dtype: torch.dtype, device: str = "cpu") -> int:
    """Tokens whose logits in the compute dtype `dtype` are held at once on a type of device.

    Each chunk reads and writes the whole gradient of `weight` once, so a GPU takes thousands: below that, this traffic
    and the launches are most of the loss's time (`benchmarks/chunked_loss.py --rows` measures it).
    """
    if device == "cpu":
        return max(1, CHUNK_BYTES // (vocab * dtype.itemsize))
    return max(1, min(GPU_ROWS, GPU_CHUNK_BYTES // (vocab * dtype.itemsize)))


def _chunks(hidden: Tensor, matrix: Tensor, chunk_bytes: int | None) -> Iterator[tuple[slice, Tensor]]:
    """(places in hidden (n, d), their logits in its dtype) of chunks; the logits are overwritten by the next."""
    (n, _), vocab = hidden.shape, len(matrix)
    most = chunk_rows(vocab, hidden.dtype, hidden.device.type)
    if chunk_bytes is not None:
        most = max(1, chunk_bytes // (vocab * hidden.element_size()))
    logits = hidden.new_empty(min(most, n), vocab)
    for start in range(0, n, most):
        chunk = logits[: n - start]
        torch.mm(hidden[start : start + most], matrix.t(), out=chunk)
        yield slice(start, start + len(chunk)), chunk


def _parts(places: slice, chunk: Tensor, exact: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(places, logits) of parts of a chunk that fill `EXACT_BYTES` in dtype `exact`."""
    most = EXACT_BYTES["cuda"]
    if chunk.device.type == "cpu":
        most = EXACT_BYTES["cpu"] * torch.get_num_threads()
    start = places.start
    for part in chunk.split(max(1, most // (chunk.shape[1] * exact.itemsize))):
        yield slice(start, start + len(part)), part
        start += len(part)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss: float,
        token_loss: TokenLoss | None,
        chunk_bytes: int | None,
        compiled: bool,
        grad: bool,
    ):
        grad_hidden = torch.empty_like(hidden) if grad and ctx.needs_input_grad[0] else None
        matrix, exact, own = weight.to(hidden.dtype), _exact(weight), token_loss is not None
        start = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk sets it
        grad_weight = start(weight, dtype=exact) if grad and ctx.needs_input_grad[1] else None
        losses = weight.new_zeros(
            2 + own, len(hidden), dtype=exact
        )  # cross-entropy and log(Z)^2 of each token, and its own loss
        for places, chunk in _chunks(hidden, matrix, chunk_bytes):
            whole = compiled and not own  # then nothing is kept of the exact logits
            for part, rows in [(places, chunk)] if whole else _parts(places, chunk, exact):
                logits, added = rows, None
                if token_loss is not None:
                    logits = rows.to(exact)
                    losses[2, part], added = token_loss.with_slopes(logits, targets[part], targets[part] != IGNORED)
                work = _compiled() if whole else _losses_and_slopes
                losses[:2, part] = work(logits, targets[part], exact, z_loss, slopes=grad, cross_entropy=not own)
                if added is not None:
                    rows.copy_(logits.add_(added))
            if grad_hidden is not None:
                torch.mm(chunk, matrix, out=grad_hidden[places])
            if grad_weight is not None:
                _accumulate(grad_weight, chunk, hidden[places], first=places.start == 0)
        ctx.grads = (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        cross_entropy, z, *objective = losses.sum(dim=1)
        each = losses[0] if not grad else losses.new_empty(0)
        ctx.mark_non_differentiable(cross_entropy, each, *objective)
        return (*objective, cross_entropy)[0] + z_loss * z, cross_entropy, each, *objective

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert ctx.grads is not None, "the chunked loss can be differentiated once"
        grads, ctx.grads = ctx.grads, None
        scaled = (None if grad is None else grad.mul_(grad_total) for grad in grads)
        return *scaled, None, None, None, None, None, None


def _exact(weight: Tensor) -> torch.dtype:
    """The dtype of softmax and sums: the parameters', also where a sharding engine gathers them in bf16."""
    return torch.promote_types(weight.dtype, torch.float32)


def _accumulate(total: Tensor, slopes: Tensor, x: Tensor, *, first: bool) -> None:
    """total += slopes^T x, added up in total's dtype; at `first` total, of any values, becomes the product."""
    if x.dtype == total.dtype:
        torch.addmm(total, slopes.t(), x, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(slopes.t(), x))
    else:
        total.add_(torch.mm(slopes.t(), x))


def _losses_and_slopes(
    chunk: Tensor, targets: Tensor, exact: torch.dtype, z_loss: float, *, slopes: bool, cross_entropy: bool
) -> Tensor:
    """(cross-entropy, log(Z)^2) of each row, (2, rows); with `slopes` logits become d total/d logits, else any value.

    chunk: (rows, vocab), the logits; targets: (rows,). Ignored rows get zeros. Computed in dtype `exact`.
    `cross_entropy`: whether it is part of the total.
    """
    logits, valid, index = chunk.to(exact), targets != IGNORED, targets.clamp(min=0)[:, None]
    chosen = logits.gather(1, index)
    largest = logits.amax(dim=1, keepdim=True)
    powers = logits.sub_(largest).exp_()
    sums = powers.sum(dim=1, keepdim=True)
    log_z = sums.log() + largest
    if slopes:
        # d(log Z)/d logits is the softmax, so z_loss log(Z)^2 adds 2 z_loss log(Z) softmax.
        factor = torch.where(valid[:, None], (cross_entropy + 2 * z_loss * log_z) / sums, 0)
        powers.mul_(factor)
        if cross_entropy:
            at_target = factor * (chosen - largest).exp() - valid[:, None].to(exact)
            if torch.compiler.is_compiling():  # one kernel with the rest
                powers = torch.where(torch.arange(len(powers[0]), device=chunk.device) == index, at_target, powers)
            else:
                powers.scatter_(1, index, at_target)
        if powers is not chunk:
            chunk.copy_(powers)
    return torch.where(valid, torch.cat((log_z - chosen, log_z.square()), dim=1).t(), 0)


@cache
def _compiled() -> Callable[..., Tensor]:
    """`_losses_and_slopes` in two kernels that read the logits and write the slopes in their own dtype."""
    return torch.compile(_losses_and_slopes)
