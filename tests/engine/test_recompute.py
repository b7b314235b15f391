"""Every mode of engine.recompute gives the losses, weights and moments of none, bit for bit in fp32 eager."""

from functools import cache

import pytest
import torch
from matrix import BATCH, SEQ, VOCABULARY, configuration, launch, make_ranks, run_steps, single, train_kinds, worst

from stablelm.engine.interface import build_engine

MODES = ("attention", "selective", "every:2", "full")
ALONE = make_ranks(0, 1)


@cache
def trained(*overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps, and all that a checkpoint would hold then."""
    config = configuration(*overrides)
    engine = build_engine(config, "single", ALONE)
    return run_steps(engine, ALONE, config, 1, 3), engine.tensors()


def assert_same(mode: str, *overrides: str) -> None:
    (losses, tensors), (expected, wanted) = trained(f"engine.recompute={mode}", *overrides), trained(*overrides)
    assert losses == expected
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["pre_ln", "magneto_sigma", "catformer", "denseformer", "value_residual", "e_spa"])
def test_nothing_changes(method: str, mode: str):
    assert_same(mode, f"model.method={method}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", ["model.dropout=0.2", "train.precision=bf16", "model.attention.logit_cap=5"])
def test_nothing_changes_with(more: str, mode: str):
    assert_same(mode, "model.method=pre_ln", more)


def test_dropout_is_really_drawn():
    assert trained("model.method=pre_ln", "model.dropout=0.2")[0] != trained("model.method=pre_ln")[0]


@pytest.mark.parametrize(
    ("mode", "dropout", "copies"),
    [("full", 0.0, 0), ("full", 0.1, 4), ("attention", 0.1, 4), ("selective", 0.0, 0), ("every:2", 0.1, 2)],
)
def test_the_generators_state_is_kept_for_dropout_alone(
    mode: str, dropout: float, copies: int, monkeypatch: pytest.MonkeyPatch
):
    engine = build_engine(configuration(f"engine.recompute={mode}", f"model.dropout={dropout}"), "single", ALONE)
    tokens, found = torch.randint(0, VOCABULARY, (BATCH, SEQ)), []
    state = torch.get_rng_state

    def read() -> torch.Tensor:
        found.append(1)
        return state()

    monkeypatch.setattr(torch, "get_rng_state", read)
    engine.loss(tokens, tokens)
    assert len(found) == copies


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["pre_ln", "catformer"])
def test_compiled_layers_recompute_too(method: str, mode: str):
    if (method, mode) == ("catformer", "selective"):
        pytest.skip("refused by a rule: tests/config/test_memory_rules.py")
    model = (f"model.method={method}", "model.n_layers=3")
    found = trained(*model, f"engine.recompute={mode}", "train.compile=true")[0]
    assert worst(found, trained(*model)[0]) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["attention", "selective", "every:2"])
@pytest.mark.parametrize("method", ["magneto_sigma", "catformer", "denseformer", "value_residual"])
def test_every_engine_recomputes(method: str, mode: str):
    kinds = ["ddp", "fsdp2", "zero1", "zero2", *(["zero3"] if mode != "selective" else [])]
    model = (f"model.method={method}",)
    expected = single(*model, steps=3)
    found = launch(train_kinds, 2, kinds, [*model, f"engine.recompute={mode}"], 3)
    assert {kind: worst(losses, expected) <= 1e-6 for kind, losses in found.items()} == dict.fromkeys(kinds, True)
