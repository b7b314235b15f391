"""The real engine on rank 0 of a world of any size, in one process: a fake process group and fake tensors."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from stablelm.config.schema import Config
from stablelm.engine.peak_memory.rank_memory import Layout
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.model.memory.memory_tracker import MemoryTracker
from stablelm.private_names import FakeStore, FakeTensorMode


@contextmanager
def fake_ranks(layout: Layout, nodes: int) -> Iterator[Ranks]:
    """Rank 0 of a world whose other ranks do not exist."""
    device = torch.device("cpu")
    if layout.world_size == 1 or layout.kind == "single":
        yield Ranks(0, 1, device, None, None)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world_size)
    try:
        yield Ranks(0, layout.world_size, device, None, None, nodes=nodes)
    finally:
        dist.destroy_process_group()


class FakeEngine(TorchEngine):
    """The real engine, its tensors fake from the moment on at which they would take memory.

    `phases`: peaks by kind of each (micro-batch, phase of the step), as its `tracker` found them.
    """

    def __init__(self, config: Config, kind: str, ranks: Ranks):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = MemoryTracker()
        self.phases: dict[tuple[int, str], Counter[str]] = {}
        self.operations_by_layer: list[list[int]] = [[], []]
        """Operations so far after each layer's forward pass and, last layer first, before its backward pass."""
        self.kept = 0
        """Activations when the first loss is known."""
        self._micro, self._phase = -1, "forward"
        super().__init__(config, kind, ranks)
        assert self.optimizer is not None
        # The fused kernel updates in place; its fake version would not.
        self.optimizer.step = lambda closure=None: None  # type: ignore[method-assign,assignment]
        layers = list(self.module.layers)
        for layer in layers:
            layer.register_forward_hook(self._layer_done)
        self._places = config.model.n_layers
        self._half = self._places - (self._places - 1) // 2
        self.tracker.assign(self.module.parameters(), "weights")
        self.tracker.assign(self.module.buffers(), "buffers")
        states = self.optimizer.state.values()
        self.tracker.assign((held for state in states for held in state.values() if held.ndim), "moments")

    def _materialise(self, config: Config, ranks: Ranks) -> None:
        with self.mode:
            self.module.to_empty(device=self.device)
        self._hold_parameters()

    def loss(self, tokens, targets, *, last: bool = True, boundaries=None, factors=None):
        self.tracker.backward = False
        self._micro += 1
        self._start("forward")
        sums = super().loss(tokens, targets, last=last, boundaries=boundaries, factors=factors)
        self.kept = self.kept or self.tracker.current["activations"]
        return sums

    def backward(self, loss, *, last: bool) -> None:
        self._end()
        self.tracker.backward = True
        self._start("later layers")
        super().backward(loss, last=last)
        self.tracker.assign((p.grad for p in self.module.parameters() if p.grad is not None), "gradients")

    def step(self, lr: float, *, largest_norm: float = math.inf):
        self._end()
        self._start("update")
        self._end()
        # DTensor works out the shapes of the norms on whole fake gradients; the real ones take a number each.
        self.tracker.follows = False
        return super().step(lr, largest_norm=largest_norm)

    def _layer_done(self, module: Any, inputs: Any, output: Any) -> None:
        self.operations_by_layer[0].append(self.tracker.operations)
        output[0].register_hook(self._reached)

    def _reached(self, gradient: Any) -> None:
        """The gradient of a layer's output is known: its backward pass begins."""
        before = self.operations_by_layer[1]
        before.append(self.tracker.operations)
        if len(before) - self._micro * self._places == self._half:
            self._end()
            self._start("earlier layers")

    def _start(self, phase: str) -> None:
        self._phase = phase
        self.tracker.reset_peak()

    def _end(self) -> None:
        self.phases[max(self._micro, 0), self._phase] = +self.tracker.peak
