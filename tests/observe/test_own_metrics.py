"""What functions of `observe.metrics` see on every engine, and what they must not return."""

import math

import pytest
import torch
from engine.matrix import BATCH, SEQ, configuration, make_ranks
from support.distributed import run_ranks

from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.observe.own_metrics import OwnMetrics
from stablelm.train.step import train_step

ALONE = Ranks(0, 1, torch.device("cpu"), None, None)
SETTING = ("model.n_layers=2", "engine.unit_bytes=5000")


def hooked(*names: str) -> Config:
    return configuration(*SETTING, f"observe.metrics=[{','.join(f'support.own_hooks:{name}' for name in names)}]")


def stepped(engine: Engine, ranks: Ranks, own: OwnMetrics, steps: int = 2) -> dict[str, float]:
    """The figures of the last step."""
    for step in range(1, steps + 1):
        rows = torch.randint(0, 96, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(step))
        mine = rows[ranks.rank :: ranks.world_size]
        call = own.before_update(step, (step - 1) * BATCH * SEQ)
        train_step(
            engine, ranks, mine[:, :-1], mine[:, 1:], step=step, lr=1e-2, seed=0, micro=len(mine), before_update=call
        )
    return own.take()


def of_kinds(rank: int, world_size: int, kinds: list[str]) -> dict[str, dict[str, float]]:
    ranks, config = make_ranks(rank, world_size), hooked("norms", "place")
    found = {}
    for kind in kinds:
        engine = build_engine(config, kind, ranks)
        found[kind] = stepped(engine, ranks, OwnMetrics(config, engine, ranks))
        found[f"whole {kind}"] = {"embedding": float(engine.whole("embedding.weight").double().norm())}
    return found


def alone(*names: str) -> tuple[Engine, OwnMetrics]:
    config = hooked(*names)
    engine = build_engine(config, "single", ALONE)
    return engine, OwnMetrics(config, engine, ALONE)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "kinds"), [(2, ["ddp", "fsdp2", "zero1", "zero3"]), (4, ["hsdp"])])
def test_sums_over_elements_are_the_same_on_every_engine(world_size: int, kinds: list[str]):
    engine, own = alone("norms", "place")
    expected = stepped(engine, ALONE, own)
    assert len(expected) == 4 * 3 + 4 and all(
        math.isnan(value) == name.endswith("nan") for name, value in expected.items()
    )
    found = run_ranks(of_kinds, world_size, kinds)
    for kind in kinds:
        assert found[0][kind] == pytest.approx(expected, rel=1e-4, nan_ok=True), kind
        assert found[0][kind] == pytest.approx(found[1][kind], nan_ok=True)


def test_weights_gradients_and_moments_of_one_process():
    engine, own = alone("norms", "place")
    before = engine.whole("embedding.weight").double().norm()
    found = stepped(engine, ALONE, own, steps=1)
    assert found["custom/weight/embedding.weight"] == pytest.approx(float(before), rel=1e-6)
    assert found["custom/exp_avg/embedding.weight"] == 0
    assert found["custom/gradient/embedding.weight"] > 0
    assert (found["custom/step"], found["custom/tokens"], found["custom/layers"]) == (1, 0, 2)
    assert own.take() == {}


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["broken"], "support.own_hooks:broken failed with KeyError: 'no such parameter' (own_hooks.py, line "),
        (["nothing"], "returns a NoneType; return a mapping"),
        (["vector"], "returns a tensor of shape (3,) as gradient; return a number"),
        (["strange_name"], "names a metric 'a b'"),
        (["place", "place_again"], "returns step, which a function before it returns too"),
    ],
)
def test_what_cannot_be_recorded_is_said(names: list[str], words: str):
    engine, own = alone(*names)
    with pytest.raises(ConfigError) as found:
        stepped(engine, ALONE, own)
    assert words in str(found.value) and "\n" not in str(found.value)


def test_without_functions_a_step_calls_nothing():
    config = configuration(*SETTING)
    assert OwnMetrics(config, build_engine(config, "single", ALONE), ALONE).before_update(1, 0) is None
