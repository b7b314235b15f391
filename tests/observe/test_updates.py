"""Updates beside the weights that they change, by role."""

import pytest
import torch
from support.measured import SINGLE, engine_of, text

from stablelm.model.initialise import role_of
from stablelm.observe.updates import UpdateRatios
from stablelm.train.step import train_step


def test_ratios_by_role():
    engine = engine_of("model.method=catformer", "model.bias=true")
    ratios = UpdateRatios(engine, SINGLE)
    assert ratios.after() == {}
    start = {name: p.detach().clone() for name, p in engine.parameters().items()}
    ratios.before()
    train_step(engine, SINGLE, *text(), step=1, lr=1e-2, seed=0, micro=2)
    found = ratios.after()
    squares: dict[str, tuple[float, float]] = {}
    for name, p in ((name, p.detach()) for name, p in engine.parameters().items()):
        moved, size = squares.get(role_of(name).kind, (0.0, 0.0))
        moved, size = moved + float((p - start[name]).square().sum()), size + float(p.square().sum())
        squares[role_of(name).kind] = moved, size
    assert found.keys() == {f"update_ratio/{kind}" for kind in squares}
    assert {"query", "fc2", "embedding", "head", "projection", "norm_gain", "bias"} <= squares.keys()
    for kind, (moved, size) in squares.items():
        assert found[f"update_ratio/{kind}"] == pytest.approx((moved / size) ** 0.5, rel=1e-9)
    assert found["update_ratio/bias"] == pytest.approx(1)  # they start at zero
    assert ratios.after() == {}  # a measurement holds no copy of the weights afterwards


def test_what_stays_zero_has_ratio_zero():
    engine = engine_of("model.method=rezero")
    ratios = UpdateRatios(engine, SINGLE)
    ratios.before()
    found = ratios.after()
    assert set(found.values()) == {0.0}
    assert "update_ratio/gain" in found


def test_nothing_is_changed_by_looking():
    engine = engine_of()
    before = {name: p.detach().clone() for name, p in engine.parameters().items()}
    ratios = UpdateRatios(engine, SINGLE)
    ratios.before()
    ratios.after()
    assert all(torch.equal(before[name], p) for name, p in engine.parameters().items())
