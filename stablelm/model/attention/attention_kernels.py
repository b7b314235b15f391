"""Which kernel averages values by attention, chosen once from the model and the device, and the calls of each.

`sdpa`: torch's fused kernels, causal. `sdpa_masked`: the same with a bias on the logits. `varlen`: flash attention
within documents. `flex`: FlexAttention, which makes biases, caps and documents inside the kernel, so that no logits
are kept for the backward pass. `dense`: logits as tensors, where no fused kernel caps them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stablelm.config.schema import ModelConfig
from stablelm.methods.sizes import d_head
from stablelm.model.attention import blockwise

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Literal["sdpa", "sdpa_masked", "varlen", "flex", "dense"]
Fused = Literal["flash3", "flash", "cudnn", "efficient", "math"]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

HALF = (torch.bfloat16, torch.float16)
AMPERE, HOPPER = (8, 0), (9, 0)
WIDEST_HEAD = 256  # of flash attention, and of the sizes that FlexAttention's kernels are tuned for
NARROWEST_FLEX_HEAD = 16
NULL_FEATURES = 8  # flash attention wants multiples of it


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on; `flash`: torch's build has it, `triton` and `flash3`: their packages are there."""

    capability: tuple[int, int]
    flash: bool = True
    triton: bool = True
    flash3: bool = False


@lru_cache(maxsize=8)
def gpu_of(device: torch.device) -> Gpu | None:
    """None: it is not a CUDA device."""
    if device.type != "cuda":
        return None
    flash, triton = torch.backends.cuda.is_flash_attention_available(), find_spec("triton") is not None
    offered = getattr(torch.nn.attention, "list_flash_attention_impls", list)()  # since torch 2.11
    flash3 = "FA3" in offered and find_spec("flash_attn_interface") is not None
    return Gpu(torch.cuda.get_device_capability(device), flash, triton, flash3)


def choose(config: ModelConfig, dtype: torch.dtype, gpu: Gpu | None) -> Kernel:
    """The kernel of whole sequences for a resolved config; dtype: of queries and keys.

    FlexAttention has no dropout, and its kernels for the CPU cannot train. It also gives the log-sum-exp of each row,
    from which follows what a further term in the denominator takes; nothing but weights as tensors can be clipped.
    """
    attention, axes = config.attention, config.axes
    clips = axes.softmax.clip(config) is not None
    causal = not (axes.position.biases_logits or axes.shaping.active or attention.logit_cap or clips)
    causal, plain = causal and attention.document_end is None, causal and axes.softmax.is_plain(config)
    if plain and causal:
        return "sdpa"
    width = d_head(config)
    if clips:
        return "dense"
    if gpu is not None and gpu.capability >= AMPERE and config.dropout == 0 and width <= WIDEST_HEAD:
        if plain and gpu.flash and dtype in HALF and width % 8 == 0:
            return "varlen"
        if gpu.triton and dtype != torch.float64 and width >= NARROWEST_FLEX_HEAD:
            return "flex"
    if causal:
        return "sdpa"
    return "dense" if attention.logit_cap else "sdpa_masked"


def order(config: ModelConfig, dtype: torch.dtype, gpu: Gpu | None) -> tuple[Fused, ...]:
    """In which torch is to try its fused kernels, and no others; () leaves it to torch.

    On Hopper cuDNN trains about twice as fast as FlashAttention-2, elsewhere it is slower (transformers' pull request
    48163); FlashAttention-3, for Hopper alone and without dropout, comes first where its package is installed. With a
    mask cuDNN's backward pass can give NaN (pytorch's issue 196678).
    """
    if gpu is None or dtype not in HALF:
        return ()
    kernel, width = choose(config, dtype, gpu), d_head(config)
    if kernel == "sdpa_masked":
        return ("flash", "efficient", "math")
    if gpu.capability != HOPPER or kernel not in ("sdpa", "varlen"):
        return ()
    if gpu.flash3 and config.dropout == 0 and width <= WIDEST_HEAD and width % 8 == 0:
        return ("flash3", "cudnn", "efficient", "math")
    return ("cudnn", "flash", "efficient", "math") if kernel == "sdpa" else ()


@contextmanager
def preferred(names: tuple[Fused, ...]) -> Iterator[None]:
    """Sets this `order` for the whole process; backward passes, which may recompute, must run inside too."""
    with ExitStack() as stack:
        if "flash3" in names:
            stack.enter_context(_flash_attention_3())
        if names:
            from torch.nn.attention import SDPBackend, sdpa_kernel

            flash = SDPBackend.FLASH_ATTENTION
            efficient, math, cudnn = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION
            known = {"flash3": flash, "flash": flash, "cudnn": cudnn, "efficient": efficient, "math": math}
            stack.enter_context(sdpa_kernel([known[name] for name in names], set_priority=True))
        yield


def described(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str:
    """For a run's record: the kernel, and the order of torch's where it is set."""
    kernel, names = choose(config, dtype, gpu_of(device)), order(config, dtype, gpu_of(device))
    return f"{kernel}: {', '.join(names)}" if names else kernel


@contextmanager
def _flash_attention_3() -> Iterator[None]:
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    dropout: float,
    null: Tensor | None = None,
) -> Tensor:
    """torch's fused kernels, or our own on a CPU: (batch, heads, queries, d_head).

    `bias` holds the causal mask, without one it is causal. Queries fewer than keys, without a bias, see all of them.
    `null`: (heads,), logits of a key without a value.
    """
    if blockwise.fits(query, key, bias, dropout):
        return blockwise.causal_attention(query, key, value, scale, null)
    if null is not None:
        return _with_null(query, key, value, bias, null, scale=scale, dropout=dropout)
    grouped, cuda = query.shape[1] != key.shape[1], query.device.type == "cuda"
    if bias is not None and cuda:
        bias = bias.to(query.dtype)  # as `positions` made it, but for masks of a cache and fixed biases of layers
    if grouped and cuda and (bias is not None or query.dtype not in HALF):
        # No fused kernel takes grouped queries with a mask or in full precision: the one that does keeps all weights.
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        dropout_p=dropout,
        is_causal=bias is None and query.shape[2] == key.shape[2],
        scale=scale,
        enable_gqa=grouped,
    )


def _with_null(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, null: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """`sdpa` with a key before all others, whose value is zero and whose logit is `null`.

    Features that are appended make that logit: the null key has ones there, the other keys zeros, the queries null /
    scale, in two parts that keep its precision. Where torch's causal mask is meant, a query before all others makes the
    matrix square.
    """
    wanted = (null / scale).view(1, -1, 1, 1)
    high = wanted.to(query.dtype)
    low = (wanted - high).to(query.dtype)
    square = bias is None and query.shape[2] == key.shape[2]
    query, key, value = (F.pad(part, (0, NULL_FEATURES)) for part in (query, key, value))
    spread = torch.cat((high, low, high.new_zeros(1, len(null), 1, NULL_FEATURES - 2)), dim=-1)
    query = query + F.pad(spread, (query.shape[-1] - NULL_FEATURES, 0))
    first = F.pad(key.new_ones(2), (key.shape[-1] - NULL_FEATURES, NULL_FEATURES - 2))
    key = torch.cat((first.expand(*key.shape[:2], 1, -1), key), dim=2)
    value = F.pad(value, (0, 0, 1, 0))
    if square:
        query = F.pad(query, (0, 0, 1, 0))
    elif bias is not None:
        bias = F.pad(bias, (1, 0))
    mixed = sdpa(query, key, value, bias, scale=scale, dropout=dropout)[..., :-NULL_FEATURES]
    return mixed[:, :, 1:] if square else mixed


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: "BlockMask",
    *,
    scale: float,
    cap: float | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    null: Tensor | None = None,
) -> Tensor:
    """FlexAttention: (batch, heads, seq, d_head), within `blocks` of `block_mask`; the rest as of `score_mod`.

    `null`: as of `sdpa`; with the log-sum-exp L of a row's logits, its share is sigmoid(null - L).
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    call: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    grouped = query.shape[1] != key.shape[1]
    changed = score_mod(cap, slopes, bias)
    if null is None:
        return call(query, key, value, changed, blocks, scale, grouped)
    mixed, beside = call(query, key, value, changed, blocks, scale, grouped, return_aux=AuxRequest(lse=True))
    return mixed * torch.sigmoid(beside.lse - null[:, None]).to(mixed.dtype)[..., None]


def score_mod(cap: float | None, slopes: Tensor | None, bias: Tensor | None) -> ScoreMod | None:
    """What turns a scaled logit into what the softmax sees: capped, then biased.

    slopes: (heads,), what each head subtracts by distance; bias: (batch or 1, heads or 1, seq, seq). None: it stays.
    """
    rows, heads = (int(size > 1) for size in bias.shape[:2]) if bias is not None else (0, 0)

    def changed(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if cap:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            score = score + slopes[head] * (key - query)
        if bias is not None:
            score = score + bias[rows * batch, heads * head, query, key]
        return score

    return changed if cap or slopes is not None or bias is not None else None


def block_mask(seq_len: int, device: torch.device, numbers: Tensor | None = None) -> "BlockMask":
    """The causal mask of FlexAttention; within documents if their `numbers` are given, (batch, seq) integers."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        earlier = query >= key
        return earlier if numbers is None else earlier & (numbers[batch, query] == numbers[batch, key])

    # Compiled, it makes no tensor of the size of the mask.
    make: Any = _compiled_mask() if device.type == "cuda" else create_block_mask
    return make(seen, None if numbers is None else len(numbers), None, seq_len, seq_len, device)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=1)
def _compiled_mask() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)
