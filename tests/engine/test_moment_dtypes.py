"""Moments of two bytes and of one: the update against its formula, skipped steps, and checkpoints."""

import importlib.util
from pathlib import Path

import pytest
import torch
from matrix import BATCH, SEQ, VOCABULARY, configuration, launch, make_ranks, run_steps, single, worst

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.engine.interface import build_engine
from stablelm.engine.torch_engine import TorchEngine
from stablelm.engine.updates.moments import bytes_of_moments, scale_shape
from stablelm.errors import ConfigError
from stablelm.train.step import train_step

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
KINDS = ["bf16", pytest.param("int8", marks=needs_torchao)]
ALONE = make_ranks(0, 1)
WIDE = ("model.method=pre_ln", "model.d_model=64", "model.n_heads=4")


def settings(moments: str) -> tuple[str, ...]:
    return (*WIDE, f"train.moments={moments}")


def make(moments: str) -> TorchEngine:
    return TorchEngine(configuration(*settings(moments)), "single", ALONE)


def one_step(engine: TorchEngine, *, bad: bool = False) -> None:
    rows = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    factor = float("nan") if bad else 1.0
    train_step(
        engine, ALONE, rows[:, :-1], rows[:, 1:], step=1, lr=1e-2, seed=0, micro=BATCH, loss_factor=factor
    )  # fmt: skip


def test_a_step_in_bf16_is_the_formulas_with_rounded_moments():
    engine, config = make("bf16"), configuration(*settings("bf16")).train
    names = [name for name in engine.parameters() if "norm" not in name]
    before = {name: engine.whole(name).double() for name in names}
    rows = torch.randint(0, VOCABULARY, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(0))
    sums = engine.loss(rows[:, :-1], rows[:, 1:])
    engine.backward(sums.total / sums.valid, last=True)
    gradients = {name: gradient.double() for name, gradient in engine.gradients().items()}
    norm = float(engine.step(1e-2))
    clipped = min(1.0, config.grad_clip / (norm + 1e-6))
    for name in names:
        gradient, held = clipped * gradients[name], engine.tensors()
        # One step of AdamW from zero moments is m / (1 - b1) = g, v / (1 - b2) = g^2.
        decay = 0.0 if "embedding" in name else config.weight_decay
        wanted = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + config.eps)
        assert torch.allclose(engine.whole(name).double(), wanted, rtol=1e-5, atol=1e-7), name
        for moment, value in (("exp_avg", 0.1 * gradient), ("exp_avg_sq", 0.05 * gradient**2)):
            stored = held[f"optim.{name}.{moment}"]
            assert stored.dtype == torch.bfloat16
            assert torch.allclose(stored.double(), value, rtol=2**-8, atol=1e-38), (name, moment)


@pytest.mark.parametrize("moments", KINDS)
def test_losses_stay_near_those_of_whole_moments(moments: str):
    assert worst(single(*settings(moments)), single(*WIDE)) < 1e-3


@pytest.mark.parametrize("moments", KINDS)
def test_a_skipped_step_changes_no_bit(moments: str):
    engine = make(moments)
    one_step(engine)
    before = {name: tensor.clone() for name, tensor in engine.tensors().items()}
    one_step(engine, bad=True)
    for name, tensor in engine.tensors().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("moments", KINDS)
def test_a_resume_is_exact(moments: str, tmp_path: Path):
    config = configuration(*settings(moments))
    whole, first, second = (build_engine(config, "single", ALONE) for _ in range(3))
    losses = run_steps(whole, ALONE, config, 1, 6)
    run_steps(first, ALONE, config, 1, 3)
    save_tensors(tmp_path / "saved", first.tensors(), None)
    load_tensors(tmp_path / "saved", second.tensors(), None)
    second.loaded()
    assert run_steps(second, ALONE, config, 4, 6) == losses[3:]


@needs_torchao
def test_codes_and_scales_hold_the_moments_of_int8():
    engine = make("int8")
    one_step(engine)
    held = engine.tensors()
    name = "optim.layers.0.feedforward.body.fc1.weight"
    assert held[f"{name}.exp_avg"].dtype == torch.uint8 and held[f"{name}.exp_avg"].shape == (256, 64)
    assert held[f"{name}.exp_avg_scale"].shape == (256, 1)
    vectors = {held[f"optim.{name}.exp_avg"].dtype for name, each in engine.parameters().items() if each.ndim == 1}
    assert vectors == {torch.float32}
    assert int(held[f"{name}.exp_avg_sq"].min()) >= 1  # none is zero beside a mean that is not


@pytest.mark.parametrize(
    ("shape", "scales"), [((8, 512), (8, 2)), ((8, 384), (8, 3)), ((8, 48), None), ((8, 32), (8, 1)), ((512,), None)]
)
def test_blocks_are_parts_of_rows(shape: tuple[int, ...], scales: tuple[int, int] | None):
    assert scale_shape(shape, "int8") == scales
    assert scale_shape(shape, "bf16") is None


def test_bytes_of_moments():
    assert bytes_of_moments((8, 512), "fp32", 4) == 2 * 4 * 4096
    assert bytes_of_moments((8, 512), "bf16", 4) == 2 * 2 * 4096
    assert bytes_of_moments((8, 512), "int8", 4) == 2 * (4096 + 4 * 16)
    assert bytes_of_moments((512,), "int8", 4) == 2 * 4 * 512


def test_int8_without_torchao_is_a_sentence(monkeypatch: pytest.MonkeyPatch):
    from stablelm.engine.updates import moments

    monkeypatch.setattr(moments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'train.moments=int8 needs torchao.* pip install "stablelm\[torchao\]"'):
        moments.check_moments("int8")


def go_on(rank: int, world_size: int, kind: str, folder: str, moments: str) -> list[float]:
    ranks, config = make_ranks(rank, world_size), configuration(*settings(moments))
    engine = build_engine(config, kind, ranks)
    load_tensors(Path(folder), engine.tensors(), ranks.cpu_group)
    engine.loaded()
    return run_steps(engine, ranks, config, 4, 6)


@pytest.mark.slow
@pytest.mark.parametrize("moments", KINDS)
def test_other_engines_go_on_with_the_same_moments(moments: str, tmp_path: Path):
    config = configuration(*settings(moments))
    engine = build_engine(config, "single", ALONE)
    run_steps(engine, ALONE, config, 1, 3)
    save_tensors(tmp_path / "saved", engine.tensors(), None)
    expected = run_steps(engine, ALONE, config, 4, 6)
    for kind in ("ddp", "fsdp2", *(("zero1", "zero3") if moments == "bf16" else ())):
        found = launch(go_on, 2, kind, str(tmp_path / "saved"), moments)
        assert worst(found, expected) <= 1e-6, kind  # pyright: ignore[reportArgumentType]
