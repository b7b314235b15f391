"""Every method, alone and with spectrally normalised matrices, in bf16 where engines gather weights in bf16."""

import pytest
import torch
from engine.matrix import configuration, make_ranks, run_steps, worst
from support.distributed import run_ranks

from stablelm.config.schema import Config
from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import METHODS

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
STEPS = 3
SIGMA = ("model.reparam=sigma", "model.sigma.targets=all")


def models() -> dict[str, tuple[str, ...]]:
    """Arguments by name; those of a combination that is refused are left out."""
    asked = {name: (f"model.method={name}",) for name in METHODS}
    asked |= {f"{name} with sigma": (f"model.method={name}", *SIGMA) for name in METHODS}
    return {name: given for name, given in asked.items() if made(given, "fsdp2") is not None}


def made(given: tuple[str, ...], kind: str) -> Config | None:
    try:
        return configuration(
            *given, "train.precision=bf16", "train.lr=1e-2", "train.warmup_steps=0", f"engine.kind={kind}"
        )
    except ConfigError:
        return None


def on_ranks(rank: int, world_size: int, kind: str) -> dict[str, list[float] | str]:
    """Losses by model, or what was raised."""
    ranks, found = make_ranks(rank, world_size), {}
    for name, given in models().items():
        config = made(given, kind)
        assert config is not None
        try:
            found[name] = run_steps(build_engine(config, kind, ranks), ranks, config, 1, STEPS)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_two_processes_train_each_as_one_does(kind: str):
    found, _ = run_ranks(on_ranks, 2, kind, timeout=900)
    assert len(found) > 1.5 * len(METHODS)
    wrong = {}
    for name, given in models().items():
        config, losses = made(given, "single"), found[name]
        assert config is not None
        wanted = run_steps(build_engine(config, "single", SINGLE), SINGLE, config, 1, STEPS)
        if isinstance(losses, str) or not worst(losses, wanted) <= 5e-3:
            wrong[name] = losses, wanted
    assert not wrong
