"""A loss of the user's own in place of the cross-entropy: `train.loss`, called on a chunk of tokens at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stablelm.errors import ConfigError
from stablelm.import_path import failure, function

TRIED = 4
"""Tokens of the call before a run."""
AS_ONE = 1e-4
"""Relative difference of a token's loss beside others and alone that is rounding."""


@dataclass(frozen=True)
class TokenLoss:
    """The function at the import path `train.loss`: (logits, targets) -> the loss of each token.

    logits: (n, vocab_size) in the parameter dtype (fp32, fp64 under fp64); targets: (n,) int64 in [0, vocab_size);
    returns (n,), differentiable in the logits, each from its own row alone: how tokens are cut into chunks depends on
    memory, micro-batches and ranks. Tokens without a target (padding) have target 0, and their losses do not count.
    """

    path: str

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Raises ConfigError for a function that fails or returns anything else."""
        try:
            losses = function(self.path)(logits, targets)
        # A user's function may raise anything.
        except Exception as error:
            raise ConfigError(f"train.loss={self.path} failed with {failure(error)}; fix it, then run again") from error
        wrong = _wrong(losses, targets)
        if wrong:
            raise ConfigError(
                f"train.loss={self.path} returns {wrong}; return the loss of each of the {len(targets)} "
                "tokens, as cross_entropy(..., reduction='none') does"
            )
        return losses

    def with_slopes(self, logits: Tensor, targets: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (n,) and their gradients (n, vocab_size) to the logits, zero where not `valid`; targets as given."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = self(leaf, targets.clamp(min=0))
            if not losses.requires_grad:
                raise ConfigError(
                    f"train.loss={self.path} returns a loss without a gradient to the logits; compute it "
                    "from them in torch, without detach"
                )
            (slopes,) = torch.autograd.grad(torch.where(valid, losses, 0).sum(), leaf)
        return torch.where(valid, losses.detach(), 0), slopes.masked_fill_(~valid[:, None], 0)


def _wrong(losses: object, targets: Tensor) -> str:
    """What is returned in place of a loss for each token; '' if it is that."""
    if not isinstance(losses, Tensor):
        return f"a {type(losses).__name__}"
    if losses.shape != targets.shape:
        return f"a tensor of shape {tuple(losses.shape)}"
    return "" if losses.is_floating_point() else f"a tensor of {losses.dtype}"


def try_token_loss(path: str, vocab_size: int) -> None:
    """Calls the loss on a few tokens. ConfigError if it fails, or is not finite, or mixes tokens."""
    loss, seeded = TokenLoss(path), torch.Generator().manual_seed(0)
    logits = torch.randn(TRIED, vocab_size, generator=seeded)
    targets = torch.randint(0, vocab_size, (TRIED,), generator=seeded)
    valid = torch.ones(TRIED, dtype=torch.bool)
    losses, slopes = loss.with_slopes(logits, targets, valid)
    if not (losses.isfinite().all() and slopes.isfinite().all()):
        raise ConfigError(
            f"train.loss={path} is not finite (losses {_listed(losses)}) for logits of standard "
            "deviation 1; clamp or shift what overflows"
        )
    alone = [loss.with_slopes(logits[row : row + 1], targets[row : row + 1], valid[:1])[0] for row in range(TRIED)]
    if not torch.allclose(torch.cat(alone), losses, rtol=AS_ONE, atol=AS_ONE * float(losses.abs().max())):
        raise ConfigError(
            f"train.loss={path} gives a token another loss beside other tokens ({_listed(losses)}) than "
            f"alone ({_listed(torch.cat(alone))}); compute each token's loss from its own row of logits"
        )


def _listed(losses: Tensor) -> str:
    return ", ".join(f"{float(each):.4g}" for each in losses)
