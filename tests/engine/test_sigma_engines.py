"""Methods with state or shapes of their own train alike in one process, recomputed, accumulated, compiled and sharded."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.checkpoint.portable import load_tensors, save_tensors
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.mesh import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods import spectral
from stablelm.model.linear import Linear
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
ROWS, PIECES, STEPS = 12, 96, 20
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
# Beside sigma: a stream that grows, one with vectors of every length, values across layers, parameters of one element.
OTHERS = ("catformer", "denseformer", "value_residual", "rezero")
SIZES = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.kv_heads=2", "data.seq_len=16")
TRAINING = ("train.steps=20", "train.lr=3e-4", "train.warmup_steps=100", f"train.global_batch_size={ROWS}")


def make_config(method: str, *overrides: str) -> Config:
    config = load([], [f"model.method={method}", *SIZES, *TRAINING, *overrides]).config
    return resolve(config, pieces=PIECES, world_size=1, accelerate_precision=None)


def train(engine: TorchEngine, config: Config, ranks: Ranks, *, micro: int = ROWS, steps: range = range(STEPS)):
    """This rank's share of the mean loss at each of the steps."""
    shares = []
    for step in (index + 1 for index in steps):
        text = torch.randint(PIECES, (ROWS, 17), generator=torch.Generator().manual_seed(0))
        rows = text[ranks.rank :: ranks.world_size]
        lr = learning_rate(step, config.train)
        found = train_step(engine, ranks, rows[:, :-1], rows[:, 1:], step=step, lr=lr, seed=0, micro=micro)
        shares.append(float(found.cross_entropy) / (ROWS * 16))
    return shares


@cache
def alone(method: str, precision: str) -> list[float]:
    """Losses of one process with the whole batch at once."""
    config = make_config(method, f"train.precision={precision}")
    return train(TorchEngine(config, "single", SINGLE), config, SINGLE)


def assert_same(found: list[float], method: str, precision: str) -> None:
    wanted = alone(method, precision)
    assert len(found) == len(wanted) == STEPS
    assert wanted[0] - wanted[-1] > 1e-3  # it learned
    assert found == pytest.approx(wanted, rel=TOLERANCE[precision])


CASES = [("sigma_reparam", "fp32"), ("sigma_reparam", "fp64"), *((method, "fp64") for method in OTHERS)]


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_recompute_changes_nothing(method: str, precision: str):
    config = make_config(method, f"train.precision={precision}", "engine.recompute=full")
    assert_same(train(TorchEngine(config, "single", SINGLE), config, SINGLE), method, precision)


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_four_micro_batches_equal_one_batch(method: str, precision: str):
    config = make_config(method, f"train.precision={precision}")
    assert_same(train(TorchEngine(config, "single", SINGLE), config, SINGLE, micro=3), method, precision)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", ["sigma_reparam", *OTHERS])
def test_compiling_changes_nothing(method: str):
    torch.compiler.reset()
    config = make_config(method, "train.precision=fp64", "train.compile=true")
    assert_same(train(TorchEngine(config, "single", SINGLE), config, SINGLE), method, "fp64")


def test_vectors_move_once_a_step_whatever_runs_twice(monkeypatch: pytest.MonkeyPatch):
    calls, refresh = [], spectral.refresh
    monkeypatch.setattr(spectral, "refresh", lambda *arguments: (calls.append(1), refresh(*arguments)))
    config = make_config("sigma_reparam", "engine.recompute=full")
    engine = TorchEngine(config, "single", SINGLE)
    before = vectors(engine)
    train(engine, config, SINGLE, micro=3, steps=range(3))
    assert len(calls) == 3
    assert all(not torch.equal(value, before[name]) for name, value in vectors(engine).items())


def vectors(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Copies of u and v by name."""
    return {name: value.clone() for name, value in engine.buffers().items()}


# Sharded.


def on_rank(rank: int, world_size: int, kind: str, cases: list[tuple[str, str]], directory: Path) -> dict[str, Any]:
    """Losses of every case, then what sigma's state looks like and a checkpoint of it."""
    group = torch.distributed.group.WORLD
    ranks = Ranks(rank, world_size, torch.device("cpu"), group, group)
    result: dict[str, Any] = {"losses": {}}
    for method, precision in cases:
        config = make_config(method, f"train.precision={precision}")
        engine = TorchEngine(config, kind, ranks)
        result["losses"][method, precision] = train(engine, config, ranks, micro=2)
        if (method, precision) == ("sigma_reparam", "fp32"):
            save_tensors(directory, engine.tensors(), group)
            result |= {"vectors": vectors(engine), "norms": engine.sigma.norms()}
            result |= {"errors": engine.sigma.tracking_errors(), "weights": {}, "shards": {}}
            for name, parameter in engine.parameters().items():
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                result["weights"][name] = whole.detach().clone()
                if isinstance(parameter, DTensor):
                    result["shards"][name] = parameter.to_local().detach().clone()
    return result


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory):
    """What every rank found, by world size; and where they saved."""

    @cache
    def run(world_size: int) -> tuple[list[dict[str, Any]], Path]:
        directory = tmp_path_factory.mktemp("sharded") / "tensors"
        return run_ranks(on_rank, world_size, "fsdp2", CASES, directory, timeout=280), directory

    return run


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_train_as_one_process(world_size: int, sharded):
    ranks, _ = sharded(world_size)
    for method, precision in CASES:
        total = [sum(shares) for shares in zip(*(rank["losses"][method, precision] for rank in ranks), strict=True)]
        assert_same(total, method, precision)
