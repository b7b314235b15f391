"""What a program does with a simulated device: kernels, bytes, copies between devices, waits of the host."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
WITHOUT_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size", "set_"),
    *("resize_", "lift_fresh", "is_pinned", "_pin_memory", "wait_tensor", "device"),
}
WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}
MATRIX = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm"}
ATTENTION = ("_scaled_dot_product_", "_flash_attention_", "_varlen_attn", "flex_attention")


@dataclass(frozen=True)
class Launch:
    """One kind of kernel at one place of the program: a line of stablelm, or what autograd computes."""

    phase: str
    name: str
    place: str

    @property
    def is_matrix(self) -> bool:
        """Whether it multiplies matrices: what it reads and writes is no pointwise traffic."""
        return self.name in MATRIX or self.name.startswith(ATTENTION)


@dataclass(frozen=True)
class Copy:
    """A copy between host and device that the host does not wait for."""

    phase: str
    to_device: bool
    shape: tuple[int, ...]
    place: str


@dataclass(frozen=True)
class Wait:
    """What the host waits for."""

    phase: str
    what: str
    place: str


@dataclass
class Record:
    """How often each happened; `bytes` are those read and written on the device, were nothing kept in caches."""

    launches: Counter[Launch] = field(default_factory=Counter)
    bytes: Counter[Launch] = field(default_factory=Counter)
    copies: Counter[Copy] = field(default_factory=Counter)
    waits: Counter[Wait] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)

    def count(self, *phases: str) -> int:
        """Launches in these phases, or in all."""
        return sum(n for launch, n in self.launches.items() if not phases or launch.phase in phases)

    def pointwise_bytes(self, *phases: str) -> int:
        """Bytes of all but products of matrices and attention."""
        chosen = (launch for launch in self.bytes if not phases or launch.phase in phases)
        return sum(self.bytes[launch] for launch in chosen if not launch.is_matrix)

    def attention(self) -> set[str]:
        """Names of the kernels of attention."""
        return {launch.name for launch in self.launches if launch.name.startswith(ATTENTION)}


class Recorder(TorchDispatchMode):
    """Fills a `Record`; inside a FakeTensorMode. Whatever needs no tensor of the device is computed for real.

    A value that the host would have to fetch from the device raises torch's DataDependentOutputException or
    DynamicOutputShapeException; tensors of two devices in one operation raise AssertionError, but for numbers.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.record = Record()
        self.phase = "build"
        self.reads = False
        """Whether the host may fetch values, which are ones, and wait for them."""
        self._pinned: set[StorageWeakRef] = set()

    def wait(self, what: str) -> None:
        """The host waits here."""
        self.record.waits[Wait(self.phase, what, place())] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name() if isinstance(func, torch._ops.HigherOrderOperator) else func.overloadpacket.__name__
        if any(kind not in (Tensor, nn.Parameter, FakeTensor) for kind in types):
            return NotImplemented  # a DTensor's parts come here in their turn
        if name == "lift_fresh":
            return self._lifted(func(*args, **kwargs), args[0])
        args, kwargs = tree_map(lambda leaf: getattr(leaf, "on_host", leaf), (args, kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = torch.device(kwargs.get("device") or "cpu").type
        if device == "cpu" and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name == "is_pinned":
            return self._is_pinned(inputs[0])
        if name == "_pin_memory":
            return self._pin(torch.empty_like(inputs[0]))
        if self.reads and name == "_local_scalar_dense" and inputs[0].is_cuda:
            self.wait("a number")
            return 1
        out = func(*tree_map(_faked, args), **tree_map(_faked, kwargs))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in COPIES:
            self._copy(name, args, kwargs, outputs)
            if self.reads and name == "_to_copy" and out.is_cpu and inputs[0].is_cuda:
                with unset_fake_temporarily():
                    return torch.ones(out.shape, dtype=out.dtype)
        elif name not in WITHOUT_KERNEL:
            _check_devices(func, name, inputs, outputs)
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional", "fsdp"):
            self.record.collectives[f"{self.phase}: {name}"] += 1
        elif not _starts_nothing(func, name) and any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            launch = Launch(self.phase, name, place())
            self.record.launches[launch] += 1
            self.record.bytes[launch] += _traffic(func, name, args, kwargs, outputs)
        return out

    def _lifted(self, fake: Any, real: Tensor) -> Tensor:
        """What torch.tensor makes of numbers: fake, because it may be on its way to the device."""
        fake.on_host = real
        return fake

    def _copy(self, name: str, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
        pairs: Any = (outputs, [args[0]]) if name == "_to_copy" else (args[0], args[1])
        targets, sources = ([each] if isinstance(each, Tensor) else each for each in pairs)
        asynchronous = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for target, source in zip(targets, sources, strict=True):
            if target.device.type == source.device.type:
                continue
            if asynchronous and target.is_cpu and name == "_to_copy":
                self._pin(target)  # as torch does
            host = target if target.is_cpu else source
            kind = "blocking" if not asynchronous else "" if self._is_pinned(host) else "unpinned"
            kind = kind or ("" if host.is_contiguous() else "not contiguous")
            shape = tuple(source.shape)
            if kind:
                self.wait(f"{kind} copy {source.device.type} to {target.device.type} {shape}")
            else:
                self.record.copies[Copy(self.phase, target.is_cuda, shape, place())] += 1

    def _pin(self, tensor: Tensor) -> Tensor:
        self._pinned.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        if isinstance(tensor, FakeTensor):
            return StorageWeakRef(tensor.untyped_storage()) in self._pinned
        with unset_fake_temporarily():
            return tensor.is_pinned()


def _faked(leaf: Any) -> Any:
    mode = active_fake_mode()
    assert mode is not None
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def place() -> str:
    """The innermost line of stablelm that runs, else the line whose backward pass runs, as far as it is known."""
    frame = sys._getframe()
    while frame is not None:
        if "/stablelm/" in frame.f_code.co_filename:
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    node = torch._C._current_autograd_node()
    return "autograd" if node is None else f"{_forward_line(node)}{node.name()}"


def _line(file: str, number: object) -> str:
    return f"{file.split('/stablelm/')[-1]}:{number}"


def _forward_line(node: Any) -> str:
    """Of the operation whose gradient a node computes; '' without torch's anomaly mode."""
    lines = [line for line in node.metadata.get("traceback_", ()) if "/stablelm/" in line]
    if not lines:
        return ""
    file, number = lines[-1].split('"')[1], lines[-1].split(", line ")[1].split(",")[0]
    return f"{_line(file, number)} "


def _starts_nothing(func: Any, name: str) -> bool:
    return name in WITHOUT_KERNEL or getattr(func, "is_view", False) or getattr(func, "namespace", "") == "profiler"


def _check_devices(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """AssertionError for tensors of two devices, unless those of the host are numbers of an elementwise operation.

    Fake tensors let numbers of two devices be stacked, and of foreach operations they check none.
    """
    numbers = torch.Tag.pointwise in getattr(func, "tags", ())
    counted = [tensor for tensor in inputs if tensor.ndim or not tensor.is_cpu or not numbers]
    devices = {tensor.device.type for tensor in (*counted, *outputs)} - {"meta"}
    where = f"{name} at {place()} takes " + ", ".join(f"{tuple(t.shape)} on {t.device}" for t in inputs[:6])
    assert len(devices) < 2, where


def _traffic(func: Any, name: str, args: tuple, kwargs: dict, outputs: list[Tensor]) -> int:
    """Bytes that a kernel reads and writes on the device if it keeps nothing in caches."""
    total, written = 0, set()
    schema = getattr(func, "_schema", None)
    for index, value in enumerate((*args, *kwargs.values())):
        named = None
        if schema is not None:
            known = schema.arguments
            names = {argument.name: argument for argument in known}
            named = known[index] if index < len(args) else names[list(kwargs)[index - len(args)]]
        writes = named is not None and named.alias_info is not None and named.alias_info.is_write
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                only = writes and (name in WRITE_ONLY or (named is not None and named.name == "out"))
                total += (1 if only or not writes else 2) * _size(tensor)
                if writes:
                    written.add(id(tensor))
    return total + sum(_size(tensor) for tensor in outputs if tensor.is_cuda and id(tensor) not in written)


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that differ: an expanded tensor repeats its own."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else min(length, 1)
    return elements * tensor.element_size()
