"""Figures of the user's own functions, `observe.metrics`: what they see of a step, and what they may return."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stablelm.config.schema import Config
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import part_of
from stablelm.errors import ConfigError
from stablelm.import_path import failure, function

PREFIX = "custom/"
NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
Kind = Literal["weight", "gradient", "exp_avg", "exp_avg_sq", "momentum", "hessian", "z", "ema"]


@dataclass(frozen=True)
class StepView:
    """What a function of `observe.metrics` sees: a step whose gradients are complete and whose update is not made yet.

    `step` counts from 1, `tokens` those trained on before it. Everything is to be read only. `model` is the decoder of
    this rank, for its structure: under FSDP2, HSDP and ZeRO-3 its parameters may be shards, gathered or empty, so their
    values come from `parts` and `whole`. Every rank calls the function, and those methods that exchange data
    (`sums`, `whole`) must be called on all of them alike.
    """

    step: int
    tokens: int
    config: Config
    model: nn.Module
    _engine: Engine
    _ranks: Ranks

    @property
    def rank(self) -> int:
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        return self._ranks.world_size

    def parts(self, kind: Kind = "weight") -> dict[str, Tensor]:
        """This rank's elements of every parameter by name, flat (n,); n may be 0. Copies nothing.

        Each element of a parameter is on exactly one rank, whatever the engine: with one process all of them; under
        ddp all of them on rank 0; under fsdp2 and hsdp whole rows (vectors on rank 0); under zero1, zero2 and zero3 any
        range. So a sum over elements is `sums` of each rank's own. `weight`: the values that are updated, fp32 (fp64
        under fp64); `gradient`: of the step's mean loss over all ranks, before clipping; `exp_avg`, `exp_avg_sq`:
        Adam's moments, as the last update left them, and so the state of other optimizers (docs/optimizers.md).
        """
        if kind == "gradient":
            held = self._engine.gradient_shards()
        else:
            before, after = ("model.", "") if kind == "weight" else ("optim.", f".{kind}")
            learned = {f"{before}{name}{after}": name for name in self._engine.gradient_shards()}
            live = self._engine.tensors(optimizer=kind != "weight")
            if missing := [name for found, name in learned.items() if found not in live]:
                raise ConfigError(
                    f"train.optimizer={self.config.train.optimizer} keeps no {kind} of {missing[0]}; ask for the state "
                    "that it has, see docs/optimizers.md"
                )
            held = {name: live[found] for found, name in learned.items()}
        return {name: self._own(tensor) for name, tensor in held.items()}

    def _own(self, tensor: Tensor) -> Tensor:
        part = part_of(tensor, self.rank, self.world_size)
        return part.local.reshape(-1)[: part.local.numel() if part.copy == 0 else 0]

    def sums(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Each float or 0-dim tensor summed over all ranks in float64: one exchange, the same names on all."""
        own = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        if self._ranks.cpu_group is not None and values:
            dist.all_reduce(own, group=self._ranks.cpu_group)
        return dict(zip(values, own.tolist(), strict=True))

    def whole(self, name: str) -> Tensor:
        """A copy of a parameter by name, whole on every rank: one exchange, and memory for all of it."""
        return self._engine.whole(name)


class OwnMetrics:
    """Calls the functions of `observe.metrics`; `take` gives what they returned last."""

    def __init__(self, config: Config, engine: Engine, ranks: Ranks):
        self._config, self._engine, self._ranks = config, engine, ranks
        self._functions = {path: function(path) for path in config.observe.metrics}
        self._found: dict[str, float] = {}

    def before_update(self, step: int, tokens: int) -> Callable[[], None] | None:
        """What to call in the step between its gradients and its update, on all ranks; None without functions."""
        return (lambda: self.call(step, tokens)) if self._functions else None

    @torch.no_grad()
    def call(self, step: int, tokens: int) -> None:
        """Raises ConfigError for a function that fails, or returns what cannot be recorded."""
        view = StepView(step, tokens, self._config, self._engine.module, self._engine, self._ranks)
        self._found = {}
        for path, own in self._functions.items():
            try:
                returned = own(view)
            # A user's function may raise anything.
            except Exception as error:
                raise ConfigError(
                    f"observe.metrics: {path} failed with {failure(error)}; fix it, or leave it out and run again"
                ) from error
            self._add(path, returned)

    def _add(self, path: str, returned: object) -> None:
        if not isinstance(returned, Mapping):
            raise ConfigError(
                f"observe.metrics: {path} returns a {type(returned).__name__}; return a mapping of names to numbers"
            )
        for name, value in returned.items():
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ConfigError(
                    f"observe.metrics: {path} names a metric {name!r}; use letters, digits, '_', '-' and "
                    "'.', with '/' between groups"
                )
            if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
                raise ConfigError(f"observe.metrics: {path} returns {_shown(value)} as {name}; return a number")
            if PREFIX + name in self._found:
                raise ConfigError(
                    f"observe.metrics: {path} returns {name}, which a function before it returns too; "
                    "give it another name"
                )
            self._found[PREFIX + name] = float(value)

    def take(self) -> dict[str, float]:
        """The figures of the last call, by name below `custom/`; none a second time."""
        found, self._found = self._found, {}
        return found


def _shown(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
