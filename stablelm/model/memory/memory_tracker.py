"""Live bytes by kind, and collectives, of everything that runs inside a context: fake tensors or real ones.

torch's FSDPMemTracker was tried: it hooks every module of an FSDP unit as if it were a unit of its own and so gathers
grouped layers once per layer. Storages are followed here in the same way (weak references, `resize_`); their kinds come
from the operations.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stablelm.private_names import TorchDispatchMode, active_fake_mode, tree_leaves

# operation: (kind, the argument that a rank sends or, for a gather, receives; None: the result)
_COLLECTIVES = {
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", None),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "broadcast_": ("broadcast", 0),
}

_WORK = ("aten", "fsdp", "c10d", "_c10d_functional")
# Nothing for the device to do.
_FREE = ("empty", "empty_like", "new_empty", "detach", "wait_tensor", "_unsafe_view")


class MemoryTracker(TorchDispatchMode):
    """Follows storages while it is entered. `current` and `peak` are bytes by kind, `collectives` counts and bytes.

    A tensor made by an operation is an activation until `backward` is set and temporary from then on, unless the
    operation is one of FSDP's or `assign` gave the tensor a kind. Without `follows`, only collectives are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.collective_bytes: Counter[str] = Counter()
        self.operations = 0
        self.backward = False
        self.follows = True
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}
        self._total = self._highest = 0
        self._mode: Any = None

    def __enter__(self):
        self._mode = active_fake_mode()
        self._resize = torch.UntypedStorage.resize_
        tracker, original = self, self._resize

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            original(storage, size)
            tracker._resized(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        return super().__enter__()

    def __exit__(self, *failure):
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        return super().__exit__(*failure)

    def assign(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Gives the storages of `tensors`, of DTensors their local parts, a kind, whether they are followed or not."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._enter(local.untyped_storage(), kind, rename=True)

    def reset_peak(self) -> None:
        """Starts a new peak from the current state."""
        self.peak, self._highest = +self.current, self._total

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will come again with this rank's part
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if name == "wait_tensor":
            result = args[0]  # its fake version makes a tensor, which the real one does not
        else:
            result = func(*args, **kwargs)
        if active_fake_mode() is not self._mode:
            return result  # DTensor works out shapes
        self.operations += self.follows and func.namespace in _WORK and not (func.is_view or name in _FREE)
        if name in _COLLECTIVES:
            self._collective(name, args, result)
        if self.follows:
            self._follow(func, name, args, kwargs, result)
        return result

    def _collective(self, name: str, args: tuple, result: Any) -> None:
        kind, place = _COLLECTIVES[name]
        moved = result if place is None else args[place]
        self.collectives[kind] += 1
        self.collective_bytes[kind] += sum(leaf.nbytes for leaf in tree_leaves(moved) if isinstance(leaf, Tensor))

    def _follow(self, func, name: str, args: tuple, kwargs: dict, result: Any) -> None:
        kind = "temporary" if self.backward else "activations"
        fsdp = func.namespace == "fsdp"
        if fsdp:
            kind = "reduced" if name == "chunk_cat" else "gathered"
        elif name == "_to_copy" and self._is_matrix(args[0]):
            kind = "weight_copies"
        elif name == "_foreach_copy_" and all(map(self._is_matrix, args[1])):
            self.assign(args[0], "weight_copies")
        elif name == "mul" and "out" in kwargs and self._is_matrix(args[0]):
            self.assign([kwargs["out"]], "weight_copies")
        made = [*tree_leaves(result), *(tree_leaves(kwargs["out"]) if "out" in kwargs else ())]
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage(), kind, rename=fsdp)
        if name == "_reduce_scatter_base_":
            self.assign(tree_leaves(args[0]), "gradients")
            self.assign(tree_leaves(args[1]), "reduced")
        if self._total > self._highest:
            self.reset_peak()

    def _is_matrix(self, tensor: Tensor) -> bool:
        """Whether it is one of the model's."""
        return tensor.ndim == 2 and self._kind_of(tensor) in ("weights", "gathered")

    def _kind_of(self, tensor: Tensor) -> str | None:
        known = self._known.get(_key(tensor.untyped_storage()))
        return known[0] if known else None

    def _enter(self, storage: torch.UntypedStorage, kind: str, *, rename: bool) -> None:
        key = _key(storage)
        if key in self._known:
            before, size, reference = self._known[key]
            if rename and before != kind:
                self._known[key] = (kind, size, reference)
                self.current[before] -= size
                self.current[kind] += size
            self._resized(storage)
            return
        reference = weakref.ref(storage, partial(_freed, weakref.ref(self), key))
        self._known[key] = (kind, 0, reference)
        self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = _key(storage)
        if key in self._known:
            kind, before, reference = self._known[key]
            size = storage.size()
            self._known[key] = (kind, size, reference)
            self.current[kind] += size - before
            self._total += size - before

    def _drop(self, key: int) -> None:
        kind, size, _ = self._known.pop(key)
        self.current[kind] -= size
        self._total -= size


def _freed(tracker: "weakref.ref[MemoryTracker]", key: int, _: weakref.ref) -> None:
    found = tracker()
    if found is not None and key in found._known:
        found._drop(key)


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata
