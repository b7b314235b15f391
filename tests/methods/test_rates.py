"""Learning rates, decay and epsilon by group, and what CompleteP's table does to a model's first steps."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from stablelm.config.load import load
from stablelm.config.rules import resolve
from stablelm.config.schema import Config
from stablelm.engine.ranks import Ranks
from stablelm.engine.torch_engine import TorchEngine
from stablelm.methods.axes import Rates
from stablelm.methods.catalogue import METHODS
from stablelm.methods.sizes import d_head
from stablelm.model.decoder import Decoder
from stablelm.model.initialise import initialise

SINGLE = Ranks(0, 1, torch.device("cpu"), None, None)
BASE = ("model.completep.base_depth=2", "model.completep.base_width=32")


def _config(method: str, *overrides: str) -> Config:
    common = ("train.steps=5", "train.weight_decay=0.1", "train.eps=1e-12", "data.seq_len=32", "model.bias=true")
    config = load([], [f"model.method={method}", *common, *overrides]).config
    return resolve(config, pieces=200, world_size=1, accelerate_precision=None)


def _groups(config: Config) -> dict[str, tuple[float, float, float]]:
    """(learning rate / configured, decay, epsilon) of every parameter by name, after a step at that rate."""
    engine = TorchEngine(config, "single", SINGLE)
    for parameter in engine.parameters().values():
        parameter.grad = torch.zeros_like(parameter)
    engine.step(lr=0.5)
    assert engine.optimizer is not None
    names = {id(parameter): name for name, parameter in engine.parameters().items()}
    found = {}
    for group in engine.optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr"] / 0.5, group["weight_decay"], group["eps"])
    assert found.keys() == set(names.values())
    return found


def _kind(name: str) -> str:
    if not name.startswith("layers."):
        return "embedding" if name == "embedding.weight" else "head" if name == "head.weight" else "outer vector"
    return "vector" if "norm" in name or name.endswith(".bias") else "matrix"


@pytest.mark.parametrize(
    ("alpha", "depth", "width"), [(1.0, 8, 128), (0.5, 8, 128), (0.75, 2, 64), (1.0, 2, 32), (1.0, 3, 16)]
)
def test_completep_groups_equal_the_table(alpha, depth, width):
    """m_L = depth / 2, m_N = width / 32: Dey et al. 2025, table 1; epsilon is scaled in the layers alone."""
    sizes = (f"model.n_layers={depth}", f"model.d_model={width}", "model.n_heads=4")
    config = _config("completep", *sizes, *BASE, f"model.completep.alpha={alpha}")
    deep, wide = depth / 2, width / 32
    by_depth, eps = deep ** (alpha - 1), 1e-12 * deep**-alpha / wide
    table = {
        "embedding": (1, 0, 1e-12),
        "outer vector": (1, 0, 1e-12),
        "head": (1, 0.1, 1e-12),
        "matrix": (by_depth / wide, 0.1 * wide, eps),
        "vector": (by_depth, 0, eps),
    }
    seen = set()
    for name, found in _groups(config).items():
        seen.add(_kind(name))
        assert found == pytest.approx(table[_kind(name)], rel=1e-12, abs=0), name
    assert seen == table.keys()
    model = config.model
    assert model.axes.stream.gains(model) == pytest.approx((1, deep**-alpha), rel=1e-12)
    assert model.axes.init.logit_scale(d_head(model)) == pytest.approx(4 / width, rel=1e-12)
    assert model.axes.init.head_scale(model) == pytest.approx(1 / wide, rel=1e-12)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "completep"])
def test_other_methods_have_one_rate(method):
    model = _config(method, "model.n_layers=4", "model.d_model=32", "model.n_heads=4").model
    init, both = model.axes.init, (False, True)
    found = {init.rates(model, in_layer=layer, matrix=matrix) for layer in both for matrix in both}
    assert found == {Rates(1.0, 1.0, 1.0)}


def test_at_the_base_shape_completep_is_pre_ln_but_for_the_logits():
    sizes = ("model.n_layers=2", "model.d_model=32", "model.n_heads=4")
    ours, plain = (_config(method, *sizes, *BASE).model for method in ("completep", "pre_ln"))
    decoder, twin = Decoder(ours, "fp64"), Decoder(plain, "fp64")
    initialise(decoder, ours, 0)
    twin.load_state_dict(decoder.state_dict())
    tokens = torch.arange(30)[None]
    assert (twin(tokens) - decoder(tokens)).abs().max() > 1e-6
    with torch.no_grad():
        for layer in range(2):  # 1 / 8 in place of 1 / sqrt(8)
            twin.get_parameter(f"layers.{layer}.attention.body.query.weight").mul_(8**-0.5)
    torch.testing.assert_close(twin(tokens), decoder(tokens), rtol=1e-12, atol=1e-12)


# Coordinate check: what steps do to the stream must not depend on depth or width.


@cache
def _moves(method: str, depth: int, width: int, steps: int) -> float:
    """Mean |change| of the stream after the last layer over `steps` Adam steps at one learning rate, over seeds."""
    found = []
    for seed in range(3):
        sizes = (f"model.n_layers={depth}", f"model.d_model={width}", "model.n_heads=2", f"run.seed={seed}")
        base = BASE if method == "completep" else ()
        extra = () if method == "completep" else ("model.init=gpt2",)
        config = _config(method, *sizes, *base, *extra, "train.weight_decay=0", "train.grad_clip=0")
        engine = TorchEngine(replace(config, model=replace(config.model, bias=False)), "single", SINGLE)
        text = torch.randint(200, (8, 33), generator=torch.Generator().manual_seed(seed))
        states: list[Tensor] = []

        def keep(index: int, chunks: tuple[Tensor, ...], depth: int = depth, states: list = states):
            if index == depth:
                states.append(chunks[0].detach().clone())
            return chunks

        engine.module.tap = keep
        for _ in range(steps):
            engine.backward(engine.loss(text[:, :-1], text[:, 1:]).total / 256, last=True)
            engine.step(lr=1e-3)
        engine.loss(text[:, :-1], text[:, 1:])
        found.append((states[-1] - states[0]).abs().mean().item())
    return math.fsum(found) / len(found)


WIDTHS = [(2, width) for width in (32, 64, 128, 256)]
DEPTHS = [(depth, 32) for depth in (2, 4, 8, 16)]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shapes", [WIDTHS, DEPTHS], ids=["width", "depth"])
def test_completep_moves_the_stream_alike_at_any_shape(shapes, steps):
    moves = [_moves("completep", *shape, steps) for shape in shapes]
    mean = sum(moves) / len(moves)
    assert moves == pytest.approx([mean] * len(moves), rel=0.2)


@pytest.mark.parametrize("shapes", [WIDTHS, DEPTHS], ids=["width", "depth"])
def test_one_rate_for_all_does_not(shapes):
    moves = [_moves("pre_ln", *shape, 1) for shape in (shapes[0], shapes[-1])]
    assert moves[1] > 3 * moves[0]
