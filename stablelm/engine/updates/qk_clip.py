"""QK-Clip: heads whose attention logits grew beyond a bound get smaller query and key matrices after the update.

Kimi Team, Kimi K2, 2025, section 2.1: of a head whose largest logit of the step is S > tau, queries and keys are scaled
by sqrt(tau / S). Where several heads share a key it stays, and the queries take the whole factor.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stablelm.engine.tensor_parts import local_part, part_of
from stablelm.model.attention.body import Attention
from stablelm.model.linear import Linear, LowRankLinear


class QkClip:
    """The attention of a model whose logits are watched; weights are held as they were at the start."""

    def __init__(self, module: nn.Module, bound: float, device: torch.device):
        self._bound = bound
        self._bodies = [part for part in module.modules() if isinstance(part, Attention)]
        self._maps = [[_tensors(body.query), _tensors(body.key)] for body in self._bodies]
        self.begin(device)

    def begin(self, device: torch.device) -> None:
        """Before the passes of a step, or without one: what was seen is forgotten."""
        for body in self._bodies:
            dtype = torch.promote_types(next(body.parameters()).dtype, torch.float32)
            body.largest_logits = torch.full((body.config.n_heads,), -math.inf, dtype=dtype, device=device)

    @torch.no_grad()
    def clip(self, skipped: Tensor) -> None:
        """After the update, with whether it was skipped (0-dim); collective."""
        seen = torch.stack([body.largest_logits for body in self._bodies if body.largest_logits is not None])
        if dist.is_initialized():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        factors = torch.where(skipped.to(seen.device), 1.0, self._bound / seen.clamp(min=self._bound))
        for body, maps, factor in zip(self._bodies, self._maps, factors.unbind(), strict=True):
            shared = body.kv_heads < body.config.n_heads
            for tensors in maps[:1] if shared else maps:
                rows = (factor if shared else factor.sqrt()).repeat_interleave(body.d_head)
                for tensor in tensors:
                    _scale_rows(tensor, rows)


def _tensors(linear: Linear | LowRankLinear) -> list[Tensor]:
    """The matrix whose rows are features of heads, and its bias."""
    last = linear.up if isinstance(linear, LowRankLinear) else linear
    return [last.weight] if last.bias is None else [last.weight, last.bias]


def _scale_rows(tensor: Tensor, factors: Tensor) -> None:
    """Of this rank's rows; factors: (rows,)."""
    local = local_part(tensor).detach()
    first = part_of(tensor, 0, 1).start // math.prod(tensor.shape[1:])
    own = factors[first : first + len(local)].to(local.device, local.dtype)
    local.mul_(own if local.ndim == 1 else own[:, None])
