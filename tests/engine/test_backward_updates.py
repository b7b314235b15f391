"""engine.optimizer_in_backward: losses, weights and moments of the ordinary update, never all gradients at once."""

import math
from pathlib import Path

import pytest
import torch
from matrix import BATCH, SEQ, VOCABULARY, configuration, make_ranks, run_steps

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.config.schema import Config
from stablelm.engine.interface import StepResult
from stablelm.engine.torch_engine import TorchEngine
from stablelm.train.step import train_step

ALONE = make_ranks(0, 1)
HOOKS = "engine.optimizer_in_backward=true"


def settings(*overrides: str) -> Config:
    return configuration("train.grad_clip=0", *overrides)


def make(*overrides: str) -> TorchEngine:
    return TorchEngine(settings(*overrides), "single", ALONE)


def step(engine: TorchEngine, **options) -> StepResult:
    rows = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return train_step(engine, ALONE, rows[:, :-1], rows[:, 1:], step=1, lr=1e-2, seed=0, micro=BATCH, **options)


def kept(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors().items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.method=pre_ln",),
        ("model.method=pre_ln", "model.tie_embeddings=true", "train.precision=bf16"),
        ("model.method=magneto_sigma", "engine.recompute=full"),
        ("model.method=catformer", "engine.recompute=selective"),
        ("model.method=value_residual", "engine.recompute=attention", "train.moments=bf16"),
        ("model.method=denseformer", "model.dropout=0.1"),
    ],
)
def test_a_run_is_that_of_the_ordinary_update(overrides: tuple[str, ...]):
    config = settings(*overrides)
    ordinary, hooked = make(*overrides), make(*overrides, HOOKS)
    assert run_steps(hooked, ALONE, config, 1, 4) == run_steps(ordinary, ALONE, config, 1, 4)
    assert_same(kept(hooked), kept(ordinary))


def test_the_norm_is_that_of_all_gradients():
    assert float(step(make(HOOKS)).grad_norm) == pytest.approx(float(step(make()).grad_norm), rel=1e-6)


def test_gradients_are_never_there_together():
    engine = make(HOOKS)
    together: list[int] = []
    for parameter in engine.module.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: together.append(sum(p.grad is not None for p in engine.module.parameters()))
        )
    step(engine)
    assert len(together) == len(engine.parameters())
    assert max(together) <= 1


def test_nothing_is_updated_by_a_loss_that_is_not_finite():
    engine = make(HOOKS)
    step(engine)
    before = kept(engine)
    result = step(engine, loss_factor=math.nan)
    assert bool(result.skipped)
    assert_same(kept(engine), before)
    assert not bool(step(engine).skipped)


def test_a_gradient_that_is_not_finite_reaches_no_weight():
    engine = make(HOOKS)
    engine.parameters()["layers.1.feedforward.body.fc1.weight"].register_hook(lambda gradient: gradient * math.inf)
    assert bool(step(engine).skipped)
    assert all(bool(tensor.isfinite().all()) for tensor in engine.tensors().values())


def test_a_dry_run_frees_gradients_and_changes_nothing():
    engine, tokens = make(HOOKS), torch.zeros(BATCH, SEQ, dtype=torch.int64)
    before = kept(engine)
    engine.begin(None)
    engine.backward(engine.loss(tokens, tokens).total, last=True)
    assert all(parameter.grad is None for parameter in engine.module.parameters())
    engine.clear_gradients()
    assert_same(kept(engine), before)


def test_passes_outside_of_a_step_keep_their_gradients():
    engine, tokens = make(HOOKS), torch.zeros(BATCH, SEQ, dtype=torch.int64)
    before = kept(engine)
    engine.backward(engine.loss(tokens, tokens).total, last=True)
    assert all(parameter.grad is not None for parameter in engine.module.parameters())
    engine.clear_gradients()
    assert_same(kept(engine), before)


def test_a_resume_is_exact(tmp_path: Path):
    config = settings(HOOKS)
    whole, first, second = make(HOOKS), make(HOOKS), make(HOOKS)
    losses = run_steps(whole, ALONE, config, 1, 6)
    run_steps(first, ALONE, config, 1, 3)
    save_tensors(tmp_path / "saved", first.tensors(), None)
    load_tensors(tmp_path / "saved", second.tensors(), None)
    second.loaded()
    assert run_steps(second, ALONE, config, 4, 6) == losses[3:]
