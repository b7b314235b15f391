"""The list of optimizers: names of `train.optimizer` and the update that each stands for."""

from collections.abc import Callable
from typing import Any

from stablelm.optimizers.adamw import AdamWUpdate
from stablelm.optimizers.interface import Update
from stablelm.optimizers.lion import LionUpdate
from stablelm.optimizers.muon import MuonUpdate
from stablelm.optimizers.sam import SamUpdate
from stablelm.optimizers.schedule_free import ScheduleFreeUpdate
from stablelm.optimizers.sophia import SophiaUpdate
from stablelm.optimizers.stable_adamw import StableAdamWUpdate

# Each from a `config.schema.TrainConfig`.
OPTIMIZERS: dict[str, Callable[[Any], Update]] = {
    "adamw": lambda train: AdamWUpdate(train.eps_inside),
    "muon": lambda train: MuonUpdate(train.muon, AdamWUpdate(train.eps_inside), train.precision == "bf16"),
    "sophia": lambda train: SophiaUpdate(train.sophia),
    "sam": lambda train: SamUpdate(train.sam, OPTIMIZERS[train.sam.base](train)),
    "looksam": lambda train: SamUpdate(train.sam, OPTIMIZERS[train.sam.base](train), looks=True),
    "stable_adamw": lambda train: StableAdamWUpdate(),
    "lion": lambda train: LionUpdate(),
    "schedule_free": lambda train: ScheduleFreeUpdate(train.betas[0]),
}
SECTIONS = {"muon": ("muon",), "sophia": ("sophia",), "sam": ("sam", "looksam")}
"""The optimizers that read the options `train.<section>`; Muon's also as the base of sam."""


def find(train: Any) -> Update:
    """The update of a `config.schema.TrainConfig`."""
    return OPTIMIZERS[train.optimizer](train)


def extra_passes(train: Any) -> float:
    """Passes over the batch beyond the first, a step on average."""
    return find(train).extra_passes()


def update_name(train: Any) -> str:
    """The optimizer that makes the update: the base of sam and looksam, else itself."""
    return train.sam.base if train.optimizer in SECTIONS["sam"] else train.optimizer


def fused(train: Any) -> bool:
    """Whether torch's own AdamW kernel makes the update."""
    return update_name(train) == "adamw" and not train.eps_inside
