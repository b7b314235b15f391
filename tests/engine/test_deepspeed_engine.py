"""ZeRO-1, 2 and 3 against one process: gradients, losses, checkpoints, and that the state is really split."""

import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.distributed import run_ranks

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.data.validation import ValidationSet
from stablelm.engine import deepspeed_config
from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.tensor_parts import FlatShard
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.evaluate.perplexity import evaluate
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
ROWS, PIECES, SEQ = 12, 96, 16
KINDS = ("zero1", "zero2", "zero3")
SIZES = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4", "model.kv_heads=2", f"data.seq_len={SEQ}")
TRAINING = ("train.steps=20", "train.lr=3e-4", "train.warmup_steps=100", f"train.global_batch_size={ROWS}")
UNCLIPPED = "train.grad_clip=0.0"


def make_config(method: str, *overrides: str) -> Config:
    config = load([], [f"model.method={method}", *SIZES, *TRAINING, *overrides]).config
    return resolve(config, pieces=PIECES, world_size=1, accelerate_precision=None)


def ranks_here(rank: int, world_size: int) -> Ranks:
    group = torch.distributed.group.WORLD
    return Ranks(rank, world_size, torch.device("cpu"), group, group)


def text() -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(PIECES, (ROWS, SEQ + 1), generator=torch.Generator().manual_seed(0))
    return rows[:, :-1], rows[:, 1:].contiguous()


def train(engine: Any, config: Config, ranks: Ranks, steps: range, *, micro: int = ROWS) -> list[tuple[float, float]]:
    """This rank's share of the mean loss, and the norm, of each of the steps."""
    tokens, targets = (part[ranks.rank :: ranks.world_size] for part in text())
    found = []
    for step in (index + 1 for index in steps):
        lr = learning_rate(step, config.train)
        result = train_step(engine, ranks, tokens, targets, step=step, lr=lr, seed=0, micro=micro)
        found.append((float(result.cross_entropy) / (ROWS * SEQ), float(result.grad_norm)))
    return found


@cache
def alone(method: str, steps: int, *overrides: str) -> list[tuple[float, float]]:
    """Losses and norms of one process."""
    config = make_config(method, *overrides)
    return train(TorchEngine(config, "single", SINGLE), config, SINGLE, range(steps))


def total(shares: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The whole loss, with rank 0's norm, of each step."""
    return [(sum(loss for loss, _ in step), step[0][1]) for step in zip(*shares, strict=True)]


def backward(engine: Any, ranks: Ranks, *, micro: int) -> None:
    """Forward and backward over this rank's rows, without a step."""
    tokens, targets = (part[ranks.rank :: ranks.world_size].split(micro) for part in text())
    for index, (inputs, wanted) in enumerate(zip(tokens, targets, strict=True)):
        loss = engine.loss(inputs, wanted).total / (ROWS * SEQ)
        engine.backward(loss, last=index == len(tokens) - 1)


def first_gradients(engine: Any, ranks: Ranks, *, micro: int = ROWS) -> dict[str, torch.Tensor]:
    backward(engine, ranks, micro=micro)
    return engine.gradients()


def assert_same_gradients(found: dict[str, torch.Tensor], config: Config) -> None:
    wanted = first_gradients(TorchEngine(config, "single", SINGLE), SINGLE)
    assert found.keys() == wanted.keys()
    everything = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        # A single element, such as gamma's, is a sum that nearly cancels.
        norm = everything if gradient.numel() == 1 else gradient.norm()
        assert (found[name] - gradient).norm() <= 1e-5 * norm, name


def assert_split(engine: Any, world_size: int) -> None:
    """Adam's moments are split in equal parts, and so are the parameters of zero3 outside the passes."""
    shards = {name: value for name, value in engine.tensors().items() if isinstance(value, FlatShard)}
    held = sum(len(shard.local) for shard in shards.values())
    whole = sum(math.prod(shard.shape) for shard in shards.values())
    assert held <= whole / world_size + 4 * len(shards)
    for parameter in engine.module.parameters():
        assert hasattr(parameter, "ds_id") == (engine.kind == "zero3")
        if engine.kind == "zero3":
            assert parameter.numel() == 0
            assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // world_size)


# What every rank does in one launch: kind, method, steps, rows of a micro-batch and overrides by name.

CASES: dict[str, tuple[str, str, int, int, tuple[str, ...]]] = {
    **{f"{kind} clipped": (kind, "sigma_reparam", 12, 3, ()) for kind in KINDS},
}
THREE_CASES = {f"{kind} clipped": (kind, "sigma_reparam", 4, 4, ()) for kind in KINDS}
SLOW_CASES = {
    "zero2 unclipped": ("zero2", "pre_ln", 4, 6, (UNCLIPPED,)),
    "zero1 catformer": ("zero1", "catformer", 3, 3, ()),
    "zero3 catformer sigma recomputed": ("zero3", "catformer_sigma", 4, 3, ("engine.recompute=full",)),
    "zero3 tied": ("zero3", "pre_ln", 4, 3, ("model.tie_embeddings=true",)),
    "zero3 rezero": ("zero3", "rezero", 4, 3, ()),
    "zero3 values recomputed": ("zero3", "value_residual", 4, 3, ("engine.recompute=full",)),
    "zero1 offload": ("zero1", "sigma_reparam", 3, 3, ("engine.offload=optimizer",)),
    "zero3 offload": ("zero3", "sigma_reparam", 3, 3, ("engine.offload=optimizer",)),
    "zero3 offload parameters": ("zero3", "sigma_reparam", 4, 3, ("engine.offload=parameters",)),
    "zero2 bf16": ("zero2", "pre_ln", 4, 6, ("train.precision=bf16",)),
    "zero3 bf16": ("zero3", "sigma_reparam", 4, 6, ("train.precision=bf16",)),
}


def on_rank(rank: int, world_size: int, cases: dict[str, Any], directory: Path | None) -> dict[str, Any]:
    deepspeed_config.PERSISTENT = 0  # or every parameter of so small a model stayed whole
    ranks, found = ranks_here(rank, world_size), {}
    for name, (kind, method, steps, micro, overrides) in cases.items():
        config = make_config(method, *overrides)
        engine = build_engine(config, kind, ranks)
        assert_split(engine, world_size)
        before = first_gradients(engine, ranks, micro=micro)
        engine.clear_gradients()
        engine.backward(engine.loss(*text()).total, last=False)
        engine.clear_gradients()
        shares = train(engine, config, ranks, range(steps), micro=micro)
        assert_split(engine, world_size)
        found[name] = {
            "gradients": before if rank == 0 else None,
            "shares": shares,
            "sigma": engine.matrices.norms(),
        }
    if directory is not None:
        found["passed on"] = pass_on(ranks, directory)
    return found


RELAY = ("zero3", "fsdp2", "zero1", "zero3", "zero2")


def pass_on(ranks: Ranks, directory: Path) -> dict[str, Any]:
    """Each engine of the relay loads what the one before it saved, goes on for two steps and saves."""
    config = make_config("sigma_reparam")
    shares: list[tuple[float, float]] = []
    engine: Any = None
    for turn, kind in enumerate(RELAY):
        engine = build_engine(config, kind, ranks)
        if turn:
            load_tensors(directory / str(turn - 1), engine.tensors(), ranks.cpu_group)
            engine.loaded()
            assert_working_copies(engine, ranks)
        shares += train(engine, config, ranks, range(2 * turn, 2 * turn + 2), micro=6)
        save_tensors(directory / str(turn), engine.tensors(), ranks.cpu_group)
    reader = build_engine(config, "zero3", ranks, train=False)
    load_tensors(directory / str(len(RELAY) - 1), reader.tensors(optimizer=False), ranks.cpu_group, partial=True)
    reader.loaded()
    data = validation()
    trained, read = (evaluate(each, ranks, data, 5) for each in (engine, reader))
    return {"shares": shares, "trained": trained, "read": read}


def validation() -> ValidationSet:
    tokens, targets = text()
    return ValidationSet(tokens, targets, bytes_per_token=1.0, documents=1)


def assert_working_copies(engine: Any, ranks: Ranks) -> None:
    """What the next forward pass reads is what was loaded."""
    if engine.kind == "fsdp2":
        return
    loaded = engine.tensors(optimizer=False)
    for name, parameter in engine.parameters().items():
        shard = loaded[f"model.{name}"]
        if engine.kind == "zero3":
            assert torch.equal(parameter.ds_tensor[: len(shard.local)], shard.local), name
        else:
            assert torch.equal(parameter.flatten()[shard.start : shard.start + len(shard.local)], shard.local), name


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory):
    """What every rank found, by world size and cases; a failure is kept too, not tried again."""

    @cache
    def launch(world_size: int, slow: bool) -> list[Any] | Exception:
        directory = tmp_path_factory.mktemp("zero")
        cases = CASES if not slow else SLOW_CASES if world_size == 2 else THREE_CASES
        try:
            ranks = run_ranks(on_rank, world_size, cases, None if slow else directory, timeout=280)
            return [*ranks, directory]
        except (RuntimeError, TimeoutError) as error:
            return error

    def run(world_size: int, slow: bool) -> list[Any]:
        found = launch(world_size, slow)
        if isinstance(found, Exception):
            raise found
        return found

    return run


def assert_case(name: str, found: list[Any], case: tuple) -> None:
    _, method, steps, _, overrides = case
    ranks = found[:-1]
    config = make_config(method, *overrides)
    bf16 = config.train.precision == "bf16"
    wanted = alone(method, steps, *(key for key in overrides if not key.startswith("engine.offload")))
    losses = total([rank[name]["shares"] for rank in ranks])
    assert wanted[0][0] - wanted[-1][0] > 1e-4  # it learned
    if name.endswith(" clipped"):
        assert all(norm > config.train.grad_clip for _, norm in wanted)
    for (loss, norm), (loss_alone, norm_alone) in zip(losses, wanted, strict=True):
        assert loss == pytest.approx(loss_alone, rel=2e-3 if bf16 else 1e-6)
        assert norm == pytest.approx(norm_alone, rel=2e-2 if bf16 else 1e-6)
    if not bf16:
        assert_same_gradients(ranks[0][name]["gradients"], config)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name: str, several):
    assert_case(name, several(2, False), CASES[name])


def test_sigma_is_that_of_one_process(several):
    config = make_config("sigma_reparam")
    engine = TorchEngine(config, "single", SINGLE)
    train(engine, config, SINGLE, range(12))
    for kind in KINDS:
        assert several(2, False)[0][f"{kind} clipped"]["sigma"] == pytest.approx(engine.matrices.norms(), rel=1e-5)


def test_engines_take_over_from_one_another(several):
    """Ten steps on five engines in turn, each from the checkpoint of the one before, are ten steps of one process."""
    *ranks, directory = several(2, False)
    config = make_config("sigma_reparam")
    losses = total([rank["passed on"]["shares"] for rank in ranks])
    for found, wanted in zip(losses, alone("sigma_reparam", 10), strict=True):
        assert found == pytest.approx(wanted, rel=1e-6)
    engine = TorchEngine(make_config("sigma_reparam", "run.seed=9"), "single", SINGLE)
    load_tensors(directory / str(len(RELAY) - 1), engine.tensors(), None)
    engine.loaded()
    assert float(engine.tensors()["optim.head.weight.step"]) == 10
    for found in (ranks[0]["passed on"]["trained"], ranks[1]["passed on"]["read"]):
        assert found.loss == pytest.approx(evaluate(engine, SINGLE, validation(), 5).loss, rel=1e-6)
    wanted = alone("sigma_reparam", 12)[10:]
    for found, step in zip(train(engine, config, SINGLE, range(10, 12)), wanted, strict=True):
        assert found == pytest.approx(step, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_more_kinds_of_model_train_as_one(name: str, several):
    assert_case(name, several(2, True), SLOW_CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_CASES)
def test_three_ranks_train_as_one(name: str, several):
    assert_case(name, several(3, True), THREE_CASES[name])


def test_a_setting_that_deepspeed_reads_otherwise_is_named():
    wanted = deepspeed_config.settings(make_config("pre_ln"), 2, 2, cuda=False)
    read = SimpleNamespace(gradient_clipping=0.5, **{k: wanted[k] for k in list(wanted)[:4]})
    with pytest.raises(ConfigError, match=r"DeepSpeed works with gradient_clipping=0\.5 though 1\.0 was asked for"):
        deepspeed_config.check(SimpleNamespace(_config=read, optimizer=None), wanted)
