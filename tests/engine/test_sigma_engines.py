"""Methods with state or shapes of their own train alike recomputed, accumulated, compiled and on several processes."""

import dataclasses
import itertools
import shutil
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import make_ranks
from support.distributed import run_ranks
from torch.distributed.tensor import DTensor

from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine, build_engine
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.errors import ConfigError
from stablelm.methods import catformer, spectral
from stablelm.private_names import compilation_settings_kept, configure_compilation
from stablelm.train.schedule import learning_rate
from stablelm.train.step import train_step

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
ROWS, PIECES, STEPS = 12, 96, 20
TOLERANCE = {"fp32": 1e-6, "fp64": 1e-9}
# Beside sigma: a stream that grows, one with vectors of every length, values across layers, parameters of one element,
# layers with and without parameters of their own, a parameter outside layers.
OTHERS = (
    *("catformer", "denseformer", "value_residual", "rezero", "dyt"),
    "denseformer model.denseformer.dilation=2 model.denseformer.period=2",
    "value_residual model.value_residual.learned=true",
)
SIZES = ("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.kv_heads=2", "data.seq_len=16")
TRAINING = ("train.steps=20", "train.lr=3e-4", "train.warmup_steps=100", f"train.global_batch_size={ROWS}")


def make_config(method: str, *overrides: str) -> Config:
    name, *options = method.split()
    config = load([], [f"model.method={name}", *options, *SIZES, *TRAINING, *overrides]).config
    return resolve(config, pieces=PIECES, world_size=1, accelerate_precision=None)


def train(engine: Engine, config: Config, ranks: Ranks, *, micro: int = ROWS, steps: range = range(STEPS)):
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
    assert wanted[0] - wanted[-1] > 1e-3  # it learned
    assert found == pytest.approx(wanted[: len(found)], rel=TOLERANCE[precision])


def vectors(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Copies of u and v by name."""
    return {name: value.clone() for name, value in engine.buffers().items()}


CASES = [("sigma_reparam", "fp32"), ("sigma_reparam", "fp64"), *((method, "fp64") for method in OTHERS)]


@pytest.mark.parametrize(("method", "precision"), CASES)
def test_recompute_changes_nothing(method: str, precision: str):
    config = make_config(method, f"train.precision={precision}", "engine.recompute=full")
    assert train(TorchEngine(config, "single", SINGLE), config, SINGLE) == alone(method, precision)


@pytest.mark.parametrize(("method", "precision"), CASES[:3])
def test_four_micro_batches_equal_one_batch(method: str, precision: str):
    config = make_config(method, f"train.precision={precision}")
    found = train(TorchEngine(config, "single", SINGLE), config, SINGLE, micro=3)
    assert len(found) == STEPS
    assert_same(found, method, precision)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiling_sigma_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    compiled("sigma_reparam", "fp32")


@pytest.mark.parametrize("method", ["sigma_reparam", *OTHERS])
def test_tracing_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch):
    """As above with the traced graphs and their backward passes run by torch: what depends on the method."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    monkeypatch.setattr(catformer, "MERGED", 4)  # a short model then merges chunks too
    compiled(method, "fp64")


def compiled(method: str, precision: str) -> None:
    torch.compiler.reset()
    config = make_config(method, f"train.precision={precision}", "train.compile=true")
    assert_same(train(TorchEngine(config, "single", SINGLE), config, SINGLE), method, precision)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["denseformer", "pre_ln"])
def test_compiled_layers_take_batches_of_several_sizes(method: str, monkeypatch: pytest.MonkeyPatch):
    """As a ramp, an evaluation and a task give them; where layers differ each has graphs of its own."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    engine = TorchEngine(make_config(method, "train.compile=true"), "single", SINGLE)
    text = torch.randint(PIECES, (ROWS, 17), generator=torch.Generator().manual_seed(0))
    for rows, length in ((ROWS, 16), (6, 16), (5, 16), (4, 8), (1, 16)):
        tokens, targets = text[:rows, :length], text[:rows, 1 : length + 1].contiguous()
        trained = engine.loss(tokens, targets)
        engine.backward(trained.total / trained.valid, last=True)
        with torch.no_grad():
            scored = engine.loss(tokens, targets)
        assert scored.cross_entropy.item() == pytest.approx(trained.cross_entropy.item(), rel=1e-5)


def test_any_number_of_compiled_models_in_a_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    text = torch.randint(PIECES, (1, 17), generator=torch.Generator().manual_seed(0))
    engines = []
    with compilation_settings_kept():
        for width in range(16, 16 * 11, 16):
            config = make_config("pre_ln", "train.compile=true", f"model.d_model={width}", "model.d_ff=32")
            engines.append(TorchEngine(config, "single", SINGLE))
            engines[-1].loss(text[:, :16], text[:, 1:].contiguous())
        assert engines[0].loss(text[:, :16], text[:, 1:].contiguous()).total.isfinite()


def test_too_many_shapes_for_compiled_layers_are_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch.compiler.reset()
    with compilation_settings_kept():
        configure_compilation(memory_budget=1.0, recompile_limit=640)  # as a deep model before this one does
        engine = TorchEngine(make_config("pre_ln", "train.compile=true"), "single", SINGLE)
        text = torch.randint(PIECES, (1, 17), generator=torch.Generator().manual_seed(0))
        parameters = [p for layer in engine.module.layers for p in layer.parameters()]

        def frozen_one_by_one() -> None:
            for parameter in parameters:
                parameter.requires_grad_(False)
                engine.loss(text[:, :16], text[:, 1:].contiguous())

        with pytest.raises(ConfigError, match=r"train\.compile=true compiles .* use train\.compile=false"):
            frozen_one_by_one()


def test_vectors_move_once_a_step_whatever_runs_twice(monkeypatch: pytest.MonkeyPatch):
    calls, refresh = [], spectral.refresh
    monkeypatch.setattr(spectral, "refresh", lambda *arguments: (calls.append(1), refresh(*arguments)))
    config = make_config("sigma_reparam", "engine.recompute=full")
    engine = TorchEngine(config, "single", SINGLE)
    before = vectors(engine)
    train(engine, config, SINGLE, micro=3, steps=range(3))
    assert len(calls) == 3
    assert all(not torch.equal(value, before[name]) for name, value in vectors(engine).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_brings_back_vectors_gains_and_norms_and_the_run_goes_on_unchanged(precision: str, tmp_path: Path):
    config = make_config("sigma_reparam", f"train.precision={precision}")
    engine = TorchEngine(config, "single", SINGLE)
    train(engine, config, SINGLE, steps=range(5))
    save_tensors(tmp_path / "tensors", engine.tensors(), None)
    saved, norms = {name: tensor.clone() for name, tensor in engine.tensors().items()}, engine.matrices.norms()
    rest = train(engine, config, SINGLE, steps=range(5, 10))
    other = resumed(config, "single", SINGLE, tmp_path / "tensors")
    leaves = {name.rsplit(".", 1)[-1] for name in saved}
    assert leaves >= {"weight", "gamma", "u", "v", "exp_avg", "exp_avg_sq", "step"} and "sigma" not in leaves
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, saved[name]), name
    assert other.matrices.norms() == norms
    assert train(other, config, SINGLE, steps=range(5, 10)) == rest


def resumed(config: Config, kind: str, ranks: Ranks, directory: Path) -> Engine:
    """An engine of other initial values into which tensors were loaded."""
    engine = build_engine(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=9)), kind, ranks)
    load_tensors(directory, engine.tensors(), ranks.cpu_group)
    engine.loaded()
    return engine


# Several processes.

KINDS = [
    ("fsdp2", "sigma_reparam", "fp32", 20, 6),
    ("fsdp2", "sigma_reparam", "fp64", 20, 3),
    ("ddp", "sigma_reparam", "fp64", 5, 2),
    *(("fsdp2", method, "fp64", 5, 6) for method in (*OTHERS, "catformer_sigma")),
]


def on_rank(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    """This rank's losses of every run, then sigma's state after the first and a checkpoint of it."""
    group = torch.distributed.group.WORLD
    ranks = Ranks(rank, world_size, torch.device("cpu"), group, group)
    catformer.MERGED = 4  # a short model then merges chunks too
    state, shares = {}, {}
    for kind, method, precision, steps, micro in KINDS:
        config = make_config(method, f"train.precision={precision}")
        engine = TorchEngine(config, kind, ranks)
        shares[kind, method, precision] = train(
            engine, config, ranks, micro=min(micro, ROWS // world_size), steps=range(steps)
        )
        if not state:
            state = {"vectors": vectors(engine), "norms": engine.matrices.norms()}
            state |= {"errors": engine.matrices.tracking_errors(), "whole": {}, "local": {}}
            for name, parameter in engine.parameters().items():
                assert isinstance(parameter, DTensor) == (parameter.ndim > 1)
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                state["whole"][name] = engine.whole(name)
                state["local"][name] = local.detach().clone()
            save_tensors(directory, engine.tensors(), group)
    return state | {"shares": shares}


def goes_on(rank: int, world_size: int, directory: Path) -> dict[str, bool]:
    """Whether a resumed run has the norms and the losses, to the last bit, of one that was not interrupted."""
    ranks, found = make_ranks(rank, world_size), {}
    for kind, precision in itertools.product(("ddp", "fsdp2", "zero3"), ("fp32", "bf16")):
        config = make_config("magneto_sigma", f"train.precision={precision}")
        engine, tensors = build_engine(config, kind, ranks), directory / f"{kind}-{precision}"
        train(engine, config, ranks, micro=3, steps=range(3))
        save_tensors(tensors, engine.tensors(), ranks.cpu_group)
        other = resumed(config, kind, ranks, tensors)
        figures = [
            (each.matrices.norms(), train(each, config, ranks, micro=3, steps=range(3, 5))) for each in (engine, other)
        ]
        found[f"{kind} {precision}"] = figures[0] == figures[1]
        if kind == "fsdp2":
            third = build_engine(dataclasses.replace(config, run=dataclasses.replace(config.run, seed=7)), kind, ranks)
            third.module.load_state_dict(engine.module.state_dict())
            found[f"state_dict {precision}"] = third.matrices.norms() == pytest.approx(
                engine.matrices.norms(), rel=1e-6
            )
    return found


@pytest.mark.slow
def test_sharded_runs_go_on_unchanged(tmp_path: Path):
    for found in run_ranks(goes_on, 2, tmp_path):
        assert len(found) == 8 and all(found.values()), found


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory):
    """What every rank found, by world size, and where they saved; made when first asked for."""

    @cache
    def run(world_size: int) -> tuple[list[dict[str, Any]], Path]:
        directory = tmp_path_factory.mktemp("several") / "tensors"
        return run_ranks(on_rank, world_size, directory, timeout=280), directory

    return run


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
class TestSeveralProcesses:
    def test_losses_are_those_of_one(self, world_size: int, several):
        ranks, _ = several(world_size)
        for kind, method, precision, steps, _ in KINDS:
            shares = [rank["shares"][kind, method, precision] for rank in ranks]
            total = [float(sum(parts)) for parts in zip(*shares, strict=True)]
            assert len(total) == steps
            assert_same(total, method, precision)

    def test_vectors_are_the_same_on_all_ranks_and_near_those_of_one(self, world_size: int, several):
        config = make_config("sigma_reparam")
        engine = TorchEngine(config, "single", SINGLE)
        train(engine, config, SINGLE)
        wanted, norms = vectors(engine), engine.matrices.norms()
        for state in several(world_size)[0]:
            assert state["vectors"].keys() == wanted.keys()
            for name, vector in state["vectors"].items():
                assert torch.equal(vector, several(world_size)[0][0]["vectors"][name]), name
                torch.testing.assert_close(vector, wanted[name], rtol=0, atol=1e-4)
            assert state["norms"] == pytest.approx(norms, rel=1e-5)
            assert state["norms"] == several(world_size)[0][0]["norms"]
            assert 0 <= max(state["errors"].values()) < 0.01

    def test_a_shard_has_a_smaller_norm_than_the_whole(self, world_size: int, several):
        """What a refresh that looked at this rank's rows alone would take for sigma."""
        for state in several(world_size)[0]:
            for matrix, tracked in state["norms"].items():
                whole, local = (state[part][f"{matrix}.weight"] for part in ("whole", "local"))
                true = torch.linalg.svdvals(whole.double())[0].item()
                assert tracked == pytest.approx(true, rel=0.01)
                assert 0 < len(local) < len(whole)
                assert torch.linalg.svdvals(local.double())[0].item() < 0.98 * true

    def test_what_they_saved_is_what_they_had(self, world_size: int, several):
        ranks, directory = several(world_size)
        engine = TorchEngine(make_config("sigma_reparam", "run.seed=9"), "single", SINGLE)
        load_tensors(directory, engine.tensors(), None)
        engine.loaded()
        assert engine.matrices.norms() == pytest.approx(ranks[0]["norms"], rel=1e-6)
        for name, tensor in engine.tensors(optimizer=False).items():
            state = ranks[0]["whole"] | ranks[0]["vectors"]
            assert torch.equal(tensor, state[name.removeprefix("model.")]), name
