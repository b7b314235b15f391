"""nGPT, shared layers and dropped layers train alike on several processes, and a run grows the same on each engine."""

from functools import cache, partialmethod
from pathlib import Path

import pytest
import torch
from matrix import configuration, make_ranks, run_steps
from support.distributed import run_ranks
from support.exported import save_run
from support.tiny import TinyCorpus

from stablelm.checkpoint.format import save_tensors
from stablelm.config.engine_rules import ZERO
from stablelm.config.schema import Config
from stablelm.engine.interface import build_engine
from stablelm.engine.ranks import Ranks
from stablelm.train.growth import grown_from

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
METHODS = {
    "ngpt": ("model.method=ngpt",),
    "ngpt_grouped": ("model.method=ngpt", "model.kv_heads=2", "engine.recompute=full"),
    "cycle": ("model.method=looped", "model.n_layers=5"),
    "sequence": ("model.stack=sequence", "model.n_layers=5", "engine.recompute=every:2"),
    "universal": ("model.method=looped", "model.shared.repeats=4", "model.reparam=sigma"),
    "layer_drop": ("model.method=layer_drop", "model.drop.rate=0.5"),
    "stochastic_depth": ("model.method=stochastic_depth", "model.drop.unit=sublayer", "model.drop.scale=training"),
    "crmsnorm": ("model.norm=crmsnorm",),
}
ENGINES = ("fsdp2", "ddp", "zero1", "zero3")
STEPS, MICRO = 3, 2


def config_of(name: str, kind: str, precision: str = "fp64") -> Config:
    plain = ("model.method=pre_ln", f"engine.kind={kind}", f"train.precision={precision}")
    return configuration(*plain, *METHODS[name])


def precision_of(kind: str) -> str:
    return "fp32" if kind in ZERO else "fp64"


@cache
def alone(name: str, precision: str) -> list[float]:
    """Losses of one process, whose batch is in twice as many micro-batches as that of each of two ranks."""
    config = config_of(name, "single", precision)
    return run_steps(build_engine(config, "single", SINGLE), SINGLE, config, 1, STEPS, micro=MICRO)


def on_ranks(rank: int, world_size: int, name: str, kind: str) -> list[float]:
    config, ranks = config_of(name, kind, precision_of(kind)), make_ranks(rank, world_size)
    return run_steps(build_engine(config, kind, ranks), ranks, config, 1, STEPS, micro=MICRO)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_does(name: str, kind: str):
    wanted = alone(name, precision_of(kind))
    assert wanted[0] != wanted[-1]
    for losses in run_ranks(on_ranks, 2, name, kind):
        assert losses == pytest.approx(wanted, rel=2e-6 if kind in ZERO else 1e-9)


@pytest.mark.parametrize("name", ["ngpt", "cycle", "stochastic_depth"])
def test_recompute_changes_nothing(name: str):
    config = config_of(name, "single")
    other = configuration(
        "model.method=pre_ln",
        *METHODS[name],
        "engine.kind=single",
        "train.precision=fp64",
        "engine.recompute=selective",
    )
    found = [run_steps(build_engine(each, "single", SINGLE), SINGLE, each, 1, 2) for each in (config, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["ngpt", "cycle", "stochastic_depth"])
def test_tracing_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    """Graphs as torch.compile traces them, and their backward passes, run by torch."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch.compiler.reset()
    plain = ("model.method=pre_ln", *METHODS[name], "engine.kind=single", "train.precision=fp64")
    found = []
    for compiled in ("false", "true"):
        config = configuration(*plain, f"train.compile={compiled}")
        found.append(run_steps(build_engine(config, "single", SINGLE), SINGLE, config, 1, 2))
    assert found[1] == pytest.approx(found[0], rel=1e-9)


def grow_on_ranks(rank: int, world_size: int, config: Config, kind: str, folder: Path) -> None:
    ranks = make_ranks(rank, world_size)
    engine = build_engine(config, kind, ranks)
    grown_from(config.run, engine, config.model, ranks)
    save_tensors(folder, engine.tensors(optimizer=False), ranks.cpu_group)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero2", "zero3"])
def test_two_processes_grow_as_one_does(kind: str, tmp_path: Path, tiny_corpus: TinyCorpus):
    from stablelm.checkpoint.reader import Reader
    from stablelm.checkpoint.tensor_index import read_index

    sizes = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4")
    source, decoder = save_run(tmp_path / "run", tiny_corpus.tokenizer, *sizes)
    vocabulary = f"model.vocab_size={decoder.config.vocab_size}"
    config = configuration(
        *("model.method=pre_ln", *sizes, vocabulary, "model.max_seq_len=32", "model.n_layers=5"),
        *(f"run.grow_from={source}", f"engine.kind={kind}"),
    )
    grow_on_ranks(0, 1, config, "single", tmp_path / "one")
    run_ranks(grow_on_ranks, 2, config, kind, tmp_path / "two")
    one, two = (Reader(folder, read_index(folder)) for folder in (tmp_path / "one", tmp_path / "two"))
    for name in one.index.tensors:
        assert torch.equal(one.tensor(name), two.tensor(name)), name
