"""One step of the real engine on fake CUDA tensors, recorded."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from simulated_gpu import fake_cuda
from simulated_gpu.recorder import Record, Recorder
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine import torch_engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine, data_parallel
from stablelm.model.attention import attention_kernels
from stablelm.model.decoder import Decoder
from stablelm.observe.layers import LayerObserver
from stablelm.train.step import train_step
from stablelm.train.stop import StepExchange

DEVICE = torch.device("cuda", 0)
SMALL = (
    *("model.method=pre_ln", "model.n_layers=2", "model.d_model=128", "model.n_heads=2", "data.seq_len=64"),
    *("train.steps=1", "train.global_batch_size=4", "train.micro_batch_size=2", "train.precision=bf16"),
)
_recorder = Recorder()


class WithoutKernels(FakeTensorMode):
    """For a device that exists and can run nothing."""

    @property
    def avoid_device_init(self) -> bool:
        return True


def prepare() -> None:
    """Once in a process, after `fake_cuda.load`."""
    fake_cuda.replace_torch_cuda(lambda what: _recorder.wait(what))
    # Values are never looked at, and large spectral norms take seconds to find.
    torch_engine.initial_tensors = lambda module, config, ranks: iter(())
    torch_engine.data_parallel = _data_parallel
    setattr(FakeTensor, "tolist", _tolist)  # noqa: B010 - torch declares other parameters


def configuration(overrides: Iterable[str], pieces: int = 256) -> tuple[Config, int]:
    """A resolved config, by default of a small model, and the number of ranks: `ranks=8` is none of its keys."""
    given = [*overrides]
    world = next((int(each.split("=")[1]) for each in given if each.startswith("ranks=")), 1)
    keys = [each for each in given if not each.startswith("ranks=")]
    named = {each.split("=")[0] for each in keys}
    config = load([], [*(each for each in SMALL if each.split("=")[0] not in named), *keys]).config
    train = replace(config.train, global_batch_size=config.train.batch_sizes.largest * world)
    resolved = resolve(replace(config, train=train), pieces=pieces, world_size=world, accelerate_precision=None)
    if config.data.document_mask:
        attention = replace(resolved.model.attention, document_end=2)
        resolved = replace(resolved, model=replace(resolved.model, attention=attention))
    return resolved, world


def simulate(*overrides: str, pieces: int = 256, lines: bool = False) -> Record:
    """Records rank 0's step; phases `build`, `forward`, `backward`, `update`, `exchange` and, with
    observe.layers_every, `observe`.

    `lines`: kernels of the backward pass get the line of the forward pass.
    """
    global _recorder
    config, world = configuration(overrides, pieces)
    kind = config.engine.kind if config.engine.kind != "auto" else "single"
    if world > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        _recorder = recorder = Recorder()
        with ExitStack() as modes:
            modes.enter_context(torch.autograd.set_detect_anomaly(lines, check_nan=False))
            ranks = Ranks(0, world, DEVICE, None, None)
            _step(_engine(config, kind, ranks, modes), ranks, config, recorder)
        return recorder.record
    finally:
        if world > 1:
            dist.destroy_process_group()


def simulate_with_triton(*overrides: str) -> Record:
    """`simulate` where FlexAttention is chosen; its operators have no kernels here, compiled or not, and need none."""
    from torch.nn.attention import flex_attention as front

    gpu = attention_kernels.Gpu((9, 0))
    changes = {
        "gpu_of": lambda device: gpu if device.type == "cuda" else None,
        "_compiled": lambda: front.flex_attention,
    }
    changes["_compiled_mask"] = lambda: front.create_block_mask
    for operator in (flex_attention, flex_attention_backward):
        if WithoutKernels not in operator.python_key_table:
            operator.py_impl(WithoutKernels)(operator.python_key_table[FakeTensorMode])
    with (
        patch.multiple(attention_kernels, **changes),
        patch.object(front, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
    ):
        return simulate(*overrides)


def _engine(config: Config, kind: str, ranks: Ranks, modes: ExitStack) -> TorchEngine:
    """The engine, whose tensors are fake from when they would take memory."""

    def decoder(*arguments: Any) -> Decoder:
        made = Decoder(*arguments)
        modes.enter_context(WithoutKernels(allow_non_fake_inputs=True))
        modes.enter_context(_recorder)
        return made

    torch_engine.Decoder = decoder
    return TorchEngine(config, kind, ranks)


def _data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The real one; other ranks send nothing."""
    wrapped = data_parallel(module, device)
    wrapped.register_comm_hook(None, _received)
    return wrapped


def _received(state: object, bucket) -> torch.futures.Future[torch.Tensor]:
    _recorder.record.collectives[f"{_recorder.phase}: all_reduce of a bucket"] += 1
    received = torch.futures.Future()
    received.set_result(bucket.buffer())
    return received


def _tolist(tensor: FakeTensor, of_each: Callable[[FakeTensor], list] = FakeTensor.tolist) -> list:
    """One copy, as of a real tensor."""
    return tensor.cpu().tolist() if tensor.is_cuda else of_each(tensor)


def _step(engine: TorchEngine, ranks: Ranks, config: Config, recorder: Recorder) -> None:
    def mark(phase: str, _: str) -> None:
        recorder.phase = phase

    train = config.train
    rows = torch.randint(2, 200, (train.batch_sizes.largest // ranks.world_size, config.data.seq_len + 1))
    tokens, targets = rows[:, :-1], rows[:, 1:]
    micro: Any = train.micro_batch_size
    result = train_step(engine, ranks, tokens, targets, step=1, lr=1e-3, seed=0, micro=micro, mark=mark)
    recorder.phase = "exchange"
    StepExchange(ranks).exchange(1, 0, result, 0)
    every = config.observe.layers_every
    if every:
        recorder.phase, recorder.reads = "observe", True
        batch = (tokens[:1], targets[:1])
        observer = LayerObserver(
            engine, ranks, every=every, batch=lambda: batch, pieces=64, record=lambda metrics: None
        )
        observer.step(every, 0)


def recorded(function: Callable[[], object]) -> Record:
    """Records what a function does that makes tensors of its own."""
    global _recorder
    _recorder = recorder = Recorder()
    with WithoutKernels(allow_non_fake_inputs=True), recorder:
        function()
    return recorder.record
