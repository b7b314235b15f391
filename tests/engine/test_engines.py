"""Gradients of every engine against one process's, and what the engines are made of."""

import dataclasses

import pytest
import torch
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.config.schema import Config, EngineConfig, ModelConfig, TrainConfig
from stablelm.engine.launch_environment import Launch
from stablelm.engine.ranks import Ranks, choose_device, connect
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.methods.catalogue import apply_method
from stablelm.train.step import train_step

MODEL = ModelConfig(n_layers=3, d_model=32, n_heads=4, kv_heads=2, d_ff=64, max_seq_len=16, vocab_size=96)
TRAIN = TrainConfig(steps=4, lr=1e-3, min_lr=1e-4, precision="fp32", grad_clip=0.0)


def make(kind: str, ranks: Ranks, *, recompute: str = "none", dropout: float = 0.0, **train) -> TorchEngine:
    model = dataclasses.replace(apply_method(MODEL), dropout=dropout)
    config = Config(model=model, train=dataclasses.replace(TRAIN, **train), engine=EngineConfig(recompute=recompute))  # pyright: ignore[reportArgumentType]
    return TorchEngine(config, kind, ranks)


def text(step: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (12, 17), generator=torch.Generator().manual_seed(step))


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def first_gradients(kind: str, ranks: Ranks, micro: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step, whole, through the same code as a training step."""
    engine = make(kind, ranks)
    kept: dict[str, torch.Tensor] = {}
    finish = engine.clear_gradients

    def keep() -> None:
        kept.update(engine.gradients())
        finish()

    engine.clear_gradients = keep
    rows = text()[ranks.rank :: ranks.world_size]
    train_step(engine, ranks, rows[:, :-1], rows[:, 1:], step=1, lr=0.0, seed=0, micro=micro)
    assert len(kept) == len(engine.parameters())
    return kept


def ranks_here(rank: int, world_size: int) -> Ranks:
    group = torch.distributed.group.WORLD
    return Ranks(rank, world_size, torch.device("cpu"), group, group)


def gradients_on_rank(rank: int, world_size: int, kind: str) -> dict[str, torch.Tensor]:
    ranks = ranks_here(rank, world_size)
    engine = make(kind, ranks)
    split = {"ddp": 1, "fsdp2": world_size, "hsdp": world_size // 2}[kind]
    for parameter in engine.module.parameters():
        assert isinstance(parameter, DTensor) == (split > 1 and parameter.ndim > 1)  # vectors stay whole
        if isinstance(parameter, DTensor) and parameter.numel() >= 1024:
            assert parameter.to_local().numel() / parameter.numel() <= 1 / split + 0.02  # split, not only wrapped
    return first_gradients(kind, ranks, micro=3)


SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world_size"), [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2", 4), ("hsdp", 4)]
)
def test_first_gradients_equal_one_process(kind: str, world_size: int):
    expected = first_gradients("single", SINGLE, micro=12)
    for found in run_ranks(gradients_on_rank, world_size, kind):
        for name, gradient in expected.items():
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error <= 1e-5, name


def losses_of(engine: TorchEngine, steps: int = 3, micro: int = 12) -> list[float]:
    found = []
    for step in range(1, steps + 1):
        rows = text(step)
        result = train_step(engine, SINGLE, rows[:, :-1], rows[:, 1:], step=step, lr=1e-3, seed=7, micro=micro)
        found.append(float(result.cross_entropy))
    return found


def test_recompute_changes_nothing_with_dropout():
    plain = losses_of(make("single", SINGLE, dropout=0.2))
    assert losses_of(make("single", SINGLE, dropout=0.2, recompute="full")) == plain
    assert losses_of(make("single", SINGLE, dropout=0.0)) != plain


def test_accumulation_equals_one_batch():
    whole_batch = losses_of(make("single", SINGLE, precision="fp64"))
    assert losses_of(make("single", SINGLE, precision="fp64"), micro=1) == pytest.approx(whole_batch, rel=1e-12)


def test_accumulation_weighs_tokens_not_micro_batches():
    """A micro-batch with few valid targets counts by its targets: the mean of means would differ."""
    rows = text()
    targets = rows[:, 1:].clone()
    targets[:6, 2:] = -100

    def gradient(micro: int) -> torch.Tensor:
        engine = make("single", SINGLE, precision="fp64")
        norm = train_step(engine, SINGLE, rows[:, :-1], targets, step=1, lr=0.0, seed=0, micro=micro).grad_norm
        return norm

    assert float(gradient(3)) == pytest.approx(float(gradient(12)), rel=1e-12)


def test_clipping_limits_the_update_but_reports_the_norm():
    free, clipped = make("single", SINGLE), make("single", SINGLE, grad_clip=1e-3)
    rows = text()
    norms = [
        float(train_step(e, SINGLE, rows[:, :-1], rows[:, 1:], step=1, lr=1e-3, seed=0, micro=12).grad_norm)
        for e in (free, clipped)
    ]
    assert norms[0] == norms[1] > 1e-3
    moments = [
        float(sum(v.norm() ** 2 for k, v in e.tensors().items() if k.endswith("exp_avg"))) ** 0.5
        for e in (free, clipped)
    ]
    assert moments[1] == pytest.approx(1e-3 * 0.1, rel=1e-3)  # (1 - beta1) x the clipped gradient
    assert moments[0] == pytest.approx(norms[0] * 0.1, rel=1e-3)


def test_only_matrices_decay():
    engine = make("single", SINGLE, weight_decay=0.5, lr=1e-2)
    before = {name: whole(p) for name, p in engine.parameters().items()}
    for parameter in engine.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(lr=1e-2)
    for name, parameter in engine.parameters().items():
        shrunk = not torch.equal(parameter, before[name])
        assert shrunk == (parameter.ndim == 2 and "embedding" not in name), name


def test_tensors_are_live_and_clean():
    engine = make("single", SINGLE, recompute="full")
    names = engine.tensors()
    assert {n for n in names if n.startswith("model.")} == {f"model.{n}" for n in engine.parameters()}
    assert not any("_checkpoint_wrapped_module" in name for name in names)
    assert sum(n.startswith("optim.") for n in names) == 3 * len(engine.parameters())
    losses_of(engine, steps=1)
    assert all(float(v) == 1 for n, v in names.items() if n.endswith(".step"))


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    second = Launch(rank=1, local_rank=1, world_size=2, launcher="torchrun")
    with pytest.raises(ConfigError, match=r"local rank 1 has no GPU of its own: .*--gpus-per-task=1"):
        choose_device(second, {"CUDA_VISIBLE_DEVICES": "0"})
    assert choose_device(second, {"ACCELERATE_USE_CPU": "True"}).type == "cpu"


def test_a_task_of_srun_takes_the_one_gpu_that_it_sees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    third = Launch(rank=2, local_rank=2, world_size=4, launcher="srun")
    for visible in ("2", "GPU-8a1b", "0"):
        assert choose_device(third, {"CUDA_VISIBLE_DEVICES": visible}) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU of its own"):
        choose_device(third, {})  # the node has one GPU, and nobody has given it to this task
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device(third, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == torch.device("cuda", 2)


def test_nccl_is_bound_to_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch):
    """So that it connects when the group is made."""
    given: dict = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: given.update(more))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **more: None)
    assert connect(Launch(), "fsdp2").device == given["device_id"] == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    connect(Launch(), "fsdp2")
    assert given["device_id"] is None


def test_bf16_needs_hardware_that_has_it(monkeypatch: pytest.MonkeyPatch):
    from stablelm.engine.ranks import check_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(ConfigError, match=r"train.precision=bf16 needs a GPU with bfloat16, which Tesla V100 has not"):
        check_precision("bf16", torch.device("cuda", 0))
    check_precision("fp32", torch.device("cuda", 0))
    check_precision("bf16", torch.device("cpu"))
