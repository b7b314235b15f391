"""How large an optimizer step is beside the weights that it changes, by their role."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import clean_name, part_of
from stablelm.model.initialise import role_of


def weight_parts(engine: Engine) -> dict[str, Tensor]:
    """This rank's part of every parameter by name, live and of any shape: changing it changes the parameter."""
    learned = [clean_name(name) for name, _ in engine.module.named_parameters()]
    live = engine.tensors(optimizer=False)
    return {name: part_of(live[f"model.{name}"], 0, 1).local for name in learned}


def counted(tensors: Mapping[str, Tensor], ranks: Ranks) -> set[str]:
    """The names of those of which this rank's part counts in a sum over ranks: of copies only the first does."""
    parts = {name: part_of(tensor, ranks.rank, ranks.world_size) for name, tensor in tensors.items()}
    return {name for name, part in parts.items() if part.copy == 0}


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """A float64 CPU tensor added up over all ranks."""
    if ranks.cpu_group is not None:
        dist.all_reduce(values, group=ranks.cpu_group)
    return values


class UpdateRatios:
    """|update| / |weights after it| of one step, all parameters of a role together."""

    def __init__(self, engine: Engine, ranks: Ranks):
        self._engine, self._ranks = engine, ranks
        self._before: dict[str, Tensor] = {}

    def before(self) -> None:
        """Call before the step: keeps a copy of this rank's weights in host memory."""
        parts = weight_parts(self._engine)
        self._before = {name: part.detach().to("cpu", copy=True) for name, part in parts.items()}

    def after(self) -> dict[str, float]:
        """Call after the step, on all ranks: `update_ratio/<role>`; none without `before`. A collective."""
        if not self._before:
            return {}
        live = self._engine.tensors(optimizer=False)
        own = counted({name: live[f"model.{name}"] for name in self._before}, self._ranks)
        kinds = sorted({role_of(name).kind for name in self._before})
        squares = {kind: [0.0, 0.0] for kind in kinds}
        for name, part in weight_parts(self._engine).items():
            if name in own:
                now, pair = part.detach().cpu().double(), squares[role_of(name).kind]
                pair[0] += float((now - self._before[name]).square().sum())
                pair[1] += float(now.square().sum())
        self._before = {}
        sums = summed(torch.tensor(list(squares.values()), dtype=torch.float64), self._ranks)
        ratios = (sums[:, 0] / sums[:, 1]).sqrt().nan_to_num(nan=0.0)  # what is zero and stays so
        return {f"update_ratio/{kind}": float(ratio) for kind, ratio in zip(kinds, ratios, strict=True)}
