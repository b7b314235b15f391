"""Names of torch and DeepSpeed that are not public: all of them are here, so that an upgrade has one file to check.

Checked against torch 2.13.0 and DeepSpeed 0.19.8. What is public in neither has no public counterpart that does the
same. Attributes of DeepSpeed's ZeRO optimizers without an underscore are no public interface either:
`engine.zero_shards` reads them, and its tests read everything back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeStore",
    "FakeTensorMode",
    "HashStore",
    "PrefixStore",
    "Store",
    "TorchDispatchMode",
    "active_fake_mode",
    "checkpoint_wrapper",
    "tree_leaves",
]


# torch: one kernel call for many tensors.


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor, 0-dim, beside it."""
    return list(torch._foreach_norm(list(tensors)))  # pyright: ignore[reportPrivateImportUsage]


def multiply_all(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies each tensor in place by a 0-dim tensor."""
    torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into the target at its place."""
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]


# torch: which buffers a module saves.


def saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that are state, by name: not those registered with persistent=False."""
    return {
        f"{prefix}.{name}".lstrip("."): buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in part._non_persistent_buffers_set
    }


# torch: tensors that compute nothing, compilation, memory and collectives.


def wrapper_tensor(kind: type[Tensor], shape: Sequence[int], like: Tensor) -> Any:
    """A tensor of a subclass, with the dtype and device of `like` and no memory of its own."""
    return torch.Tensor._make_wrapper_subclass(kind, torch.Size(shape), dtype=like.dtype, device=like.device)


RECOMPILE_LIMITS = ("recompile_limit", "accumulated_recompile_limit")


def configure_compilation(*, memory_budget: float, recompile_limit: int | None) -> None:
    """Recompiling beyond the limit (None: torch's own) fails; `memory_budget` is a share of the activations."""
    import torch._functorch.config as functorch_config

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    functorch_config.activation_memory_budget = memory_budget
    own, accumulated = (vars(torch._dynamo.config)["_config"][name].default for name in RECOMPILE_LIMITS)
    torch._dynamo.config.recompile_limit = own if recompile_limit is None else recompile_limit
    torch._dynamo.config.accumulated_recompile_limit = max(accumulated, recompile_limit or 0)


def recompile_limit_errors() -> tuple[type[Exception], ...]:
    """What compiled code raises when it is given one shape too many, after `configure_compilation`."""
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return (FailOnRecompileLimitHit,)


@contextmanager
def compilation_settings_kept() -> Iterator[None]:
    """Puts back what `configure_compilation` changes."""
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    ours = {name: getattr(dynamo, name) for name in ("fail_on_recompile_limit_hit", *RECOMPILE_LIMITS)}
    with dynamo.patch(ours), functorch.patch(activation_memory_budget=functorch.activation_memory_budget):
        yield


def record_memory_history(entries: int | None) -> None:
    """Begins to record a GPU's allocations, as many as `entries`; None ends it."""
    if entries is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=entries)


def write_memory_history(path: str) -> None:
    """Writes the recorded allocations. Raises OSError."""
    torch.cuda.memory._dump_snapshot(path)


def collectives_of_nccl() -> bytes:
    """NCCL's last collectives as torch's flight recorder has them, pickled; empty where it does not record."""
    import torch._C._distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace", None) or getattr(c10d, "_dump_fr_trace", None)
    return dump() if dump is not None else b""


# DeepSpeed.


def without_own_kernels(deepspeed: Any) -> None:
    """No kernels of DeepSpeed's own are needed; some it would compile on the spot, others it would probe for."""
    setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - pyright does not know the attribute


def settings_in_effect(engine: Any) -> Any:
    """What a DeepSpeed engine works with, as an object of attributes."""
    return engine._config


def gradient_norm_of(zero: Any) -> Any:
    """The global norm of the step under way or of the last one, from when a ZeRO optimizer has computed it."""
    return zero._global_grad_norm


def make_zero3_parameter(init: Any, parameter: nn.Parameter) -> None:
    """As `zero.Init` does it, without its broadcast: the values are equal on all ranks by construction."""
    init._convert_to_deepspeed_param(parameter)


def publish_zero3_group(zero: Any, group: int) -> None:
    """Copies a group's master weights into what the forward pass reads."""
    zero._reassign_or_swap_out_partitioned_parameters(group)


def forget_offloaded_gradients(zero: Any, stage: int) -> None:
    """Drops the lists of gradients that were moved, or are to be moved, to host memory."""
    (zero._offload_boundary_param_ids if stage == 3 else zero._offload_accumulated_param_ids).clear()
