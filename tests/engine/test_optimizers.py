"""Every optimizer against its paper in NumPy, over 20 steps in fp64; skipped steps, exact resumes, refusals, bytes."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matrix import BATCH, SEQ, VOCABULARY, configuration, launch, make_ranks, run_steps, worst
from support.plain_optimizers import (
    PlainAdamW,
    PlainAdamWInside,
    PlainLion,
    PlainMuon,
    PlainOptimizer,
    PlainScheduleFree,
    PlainSophia,
    PlainStableAdamW,
)

from stablelm.checkpoint.contents import expected_shapes
from stablelm.checkpoint.format import load_tensors, save_tensors
from stablelm.config.schema import Config
from stablelm.engine.interface import build_engine
from stablelm.engine.optimizers import make_optimizer, set_learning_rate
from stablelm.engine.peak_memory import rank_memory
from stablelm.engine.torch_engine import TorchEngine
from stablelm.engine.updates.owners import buckets, owners
from stablelm.engine.updates.rule_optimizer import RuleOptimizer
from stablelm.engine.updates.state import follow_weights
from stablelm.errors import ConfigError
from stablelm.methods.axes import Role
from stablelm.model.attention.body import Attention
from stablelm.model.initialise import roles
from stablelm.optimizers.catalogue import find
from stablelm.optimizers.muon import newton_schulz
from stablelm.plan.collectives import collectives
from stablelm.train.step import draws_of, train_step

ALONE = make_ranks(0, 1)
TINY = (
    *("model.method=pre_ln", "model.n_layers=1", "model.d_model=16", "model.n_heads=2", "data.seq_len=8"),
    *("train.global_batch_size=4", "train.micro_batch_size=2", "train.warmup_steps=5"),
)
CASES = {
    "adamw": ((), PlainAdamW),
    "eps_inside": (("train.eps_inside=true", "train.eps=1e-4"), PlainAdamWInside),
    "lion": (("train.optimizer=lion",), PlainLion),
    "stable_adamw": (("train.optimizer=stable_adamw",), PlainStableAdamW),
    "schedule_free": (("train.optimizer=schedule_free", "train.schedule=constant"), PlainScheduleFree),
    "muon": (("train.optimizer=muon",), PlainMuon),
}
ALL = {
    **{name: overrides for name, (overrides, _) in CASES.items()},
    "sophia": ("train.optimizer=sophia", "train.sophia.every=2"),
    "sam": ("train.optimizer=sam",),
    "looksam": ("train.optimizer=looksam", "train.sam.every=2"),
    "sam_muon": ("train.optimizer=sam", "train.sam.base=muon"),
    "qk_clip": ("train.optimizer=muon", "train.muon.qk_clip=0.01"),
    "ema": ("train.ema=0.9",),
}
SHAPES = {
    "layers.0.attention.body.query.weight": (6, 4),
    "layers.0.feedforward.body.fc1.weight": (3, 7),
    "layers.0.attention.norm_in.weight": (5,),
    "embedding.weight": (9, 4),
    "head.weight": (9, 4),
}


def tiny(*overrides: str) -> Config:
    return configuration(*TINY, *overrides)


def parameters_and_roles() -> tuple[dict[str, torch.nn.Parameter], dict[str, Role]]:
    drawn = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=drawn, dtype=torch.float64) for name, shape in SHAPES.items()}
    kinds = [Role("query", 0), Role("fc1", 0), Role("norm_gain", 0), Role("embedding", None), Role("head", None)]
    return {name: torch.nn.Parameter(value) for name, value in tensors.items()}, dict(zip(SHAPES, kinds, strict=True))


DECAYED = frozenset(name for name in SHAPES if "norm" not in name and "embedding" not in name)


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_the_paper(name: str):
    overrides, plain_kind = CASES[name]
    config = configuration("model.method=pre_ln", "train.precision=fp64", *overrides)
    parameters, own_roles = parameters_and_roles()
    optimizer = make_optimizer(parameters, own_roles, config.train, config.model)
    plain = plain_kind(config.train.weight_decay, config.train.betas, config.train.eps, DECAYED)
    values = {key: parameter.detach().numpy().copy() for key, parameter in parameters.items()}
    drawn = torch.Generator().manual_seed(2)
    for step in range(20):
        lr = 0.01 * min(1.0, (step + 1) / 5)
        for key, parameter in parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=drawn, dtype=torch.float64) * (1 + 5 * (step == 9))
            values[key] = plain.step(key, values[key], parameter.grad.numpy(), lr)
        set_learning_rate(optimizer, lr)
        optimizer.step()
    for key, parameter in parameters.items():
        error = np.abs(parameter.detach().numpy() - values[key]).max()
        assert error < 1e-12, (key, error)
    if isinstance(plain, PlainScheduleFree):
        for key, parameter in parameters.items():
            found = find(config.train).evaluated(parameter.detach(), optimizer.state[parameter])
            assert found is not None
            assert np.abs(found.numpy() - plain.state[key]["x"]).max() < 1e-12, key


def test_many_small_pieces_are_one_update(monkeypatch: pytest.MonkeyPatch):
    from stablelm.engine.updates import rule_optimizer

    found = []
    for at_once in (2**22, 5):
        monkeypatch.setitem(rule_optimizer.AT_ONCE, "cpu", at_once)
        for name in ("stable_adamw", "schedule_free"):
            config = configuration("model.method=pre_ln", "train.precision=fp64", *CASES[name][0])
            parameters, own_roles = parameters_and_roles()
            optimizer = make_optimizer(parameters, own_roles, config.train, config.model)
            set_learning_rate(optimizer, 0.01)
            for step in range(3):
                drawn = torch.Generator().manual_seed(step)
                for parameter in parameters.values():
                    parameter.grad = torch.randn(parameter.shape, generator=drawn, dtype=torch.float64)
                optimizer.step()
            found.append(torch.cat([parameter.detach().flatten() for parameter in parameters.values()]))
    assert torch.allclose(found[0], found[2], atol=1e-14)
    assert torch.allclose(found[1], found[3], atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name != "adamw"])
def test_what_a_gpu_computes_of_a_skipped_update_is_dropped(name: str):
    """Where the host does not look, results are those of where it does, and a skipped update changes no bit."""
    config = configuration("model.method=pre_ln", *CASES[name][0])
    found = []
    for looks in (True, False):
        parameters, own_roles = parameters_and_roles()
        optimizer = make_optimizer(parameters, own_roles, config.train, config.model)
        assert isinstance(optimizer, RuleOptimizer)
        optimizer.looks = looks
        set_learning_rate(optimizer, 0.01)
        for bad in (False, True, False):
            before = [value.clone() for value in held(optimizer)]
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, math.nan if bad else 0.5)
            setattr(optimizer, "found_inf", torch.tensor(float(bad)))  # noqa: B010
            optimizer.step()
            assert all(map(torch.equal, before, held(optimizer))) == bad
        found.append(held(optimizer))
    assert all(map(torch.equal, *found))


def held(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    tensors = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    return tensors + [value for state in optimizer.state.values() for value in state.values()]


class PlainRun:
    """A model of its own, whose gradients plain autograd takes of whole batches, updated by a plain optimizer."""

    def __init__(self, config: Config, plain: PlainOptimizer):
        self.engine = TorchEngine(config, "single", ALONE, train=False)
        self.module, self.config, self.plain = self.engine.module, config, plain
        self.module.requires_grad_(True).train()
        self.parameters = dict(self.module.named_parameters())

    def gradients(self, tokens: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.module.logits(self.module(tokens))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))

    @torch.no_grad()
    def update(self, gradients: dict[str, torch.Tensor], lr: float) -> None:
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = min(1.0, self.config.train.grad_clip / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            new = self.plain.step(name, parameter.numpy(), (gradients[name] * factor).numpy(), lr)
            parameter.copy_(torch.from_numpy(new))

    @torch.no_grad()
    def move(self, directions: dict[str, torch.Tensor], factor: float) -> None:
        for name, parameter in self.parameters.items():
            parameter.add_(directions[name], alpha=factor)


def dot(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def sophia_step(run: PlainRun, step: int, tokens, targets, kept: dict) -> dict[str, torch.Tensor]:
    assert isinstance(run.plain, PlainSophia)
    run.plain.estimate = None
    if (step - 1) % run.config.train.sophia.every == 0:
        with torch.no_grad():
            sums = run.module.logits(run.module(tokens)).softmax(-1).cumsum(-1)
        draws = draws_of(0, step, range(len(tokens)), ALONE, tokens.shape[1])
        drawn = (sums < draws[..., None]).sum(-1)
        count = tokens.numel()
        run.plain.estimate = {n: count * g.numpy() ** 2 for n, g in run.gradients(tokens, drawn).items()}
    return run.gradients(tokens, targets)


def sam_step(run: PlainRun, step: int, tokens, targets, kept: dict, *, looks: bool) -> dict[str, torch.Tensor]:
    options, first = run.config.train.sam, run.gradients(tokens, targets)
    length = math.sqrt(dot(first, first))
    if looks and (step - 1) % options.every:
        rest = kept["v"]
        factor = options.alpha * length / math.sqrt(dot(rest, rest))
        return {name: first[name] + factor * rest[name] for name in first}
    before = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    run.move(first, options.rho / length)
    second = run.gradients(tokens, targets)
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            parameter.copy_(before[name])
    cosine = dot(first, second) / length / math.sqrt(dot(second, second))
    share = math.sqrt(dot(second, second)) * cosine / length
    kept["v"] = {name: second[name] - share * first[name] for name in first}
    return second


PASSES = {
    "sophia": (sophia_step, PlainSophia),
    "sam": (partial(sam_step, looks=False), PlainAdamW),
    "looksam": (partial(sam_step, looks=True), PlainAdamW),
}


@pytest.mark.parametrize("name", PASSES)
def test_steps_of_several_passes_are_those_of_the_paper(name: str):
    config = tiny("train.precision=fp64", *ALL[name])
    gradients_of, kind = PASSES[name]
    engine = TorchEngine(config, "single", ALONE)
    decayed = frozenset(n for n, role in roles(engine.module).items() if role.kind == "head" or "body" in n)
    plain = kind(config.train.weight_decay, config.train.betas, config.train.eps, decayed)
    run, kept = PlainRun(config, plain), {}
    for step in range(1, 21):
        rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
        tokens, targets, lr = rows[:, :-1], rows[:, 1:], 1e-3 * min(1.0, step / 5)
        run.update(gradients_of(run, step, tokens, targets, kept), lr)
        train_step(engine, ALONE, tokens, targets, step=step, lr=lr, seed=0, micro=2)
    for key, parameter in run.parameters.items():
        assert float((engine.whole(key) - parameter.detach()).abs().max()) < 1e-11, key


def one_step(engine, step: int, factor: float = 1.0) -> None:
    rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
    train_step(
        engine, ALONE, rows[:, :-1], rows[:, 1:], step=step, lr=1e-2, seed=0, micro=2, loss_factor=factor
    )  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_skipped_step_changes_no_bit_and_a_resume_is_exact(name: str, tmp_path: Path):
    config = tiny(
        "model.method=sigma_reparam" if name not in ("qk_clip", "sam_muon") else "model.method=pre_ln", *ALL[name]
    )
    engine, other = (build_engine(config, "single", ALONE) for _ in range(2))
    assert {key: tensor.shape for key, tensor in engine.tensors().items()} == expected_shapes(
        config.model, config.train
    )
    one_step(engine, 1)
    before = {key: tensor.clone() for key, tensor in engine.tensors().items()}
    for step in (2, 3):  # with and without the extra pass
        one_step(engine, step, math.nan)
    assert [key for key, tensor in engine.tensors().items() if not torch.equal(tensor, before[key])] == []
    save_tensors(tmp_path / "saved", engine.tensors(), None)
    load_tensors(tmp_path / "saved", other.tensors(), None)
    other.loaded()
    for each in (engine, other):
        for step in (2, 3):
            one_step(each, step)
    held = other.tensors()
    assert [key for key, tensor in engine.tensors().items() if not torch.equal(tensor, held[key])] == []
    assert any(not torch.equal(tensor, before[key]) for key, tensor in held.items())


def test_weights_move_back_after_the_ascent_to_the_last_bit():
    engine = build_engine(tiny("train.optimizer=sam"), "single", ALONE)
    before = {key: tensor.clone() for key, tensor in engine.tensors(optimizer=False).items()}
    rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))
    seen = []

    def look() -> None:
        seen.append(all(torch.equal(tensor, before[key]) for key, tensor in engine.tensors(optimizer=False).items()))

    train_step(
        engine, ALONE, rows[:, :-1], rows[:, 1:], step=1, lr=0.1, seed=0, micro=2, before_update=look
    )  # fmt: skip
    assert seen == [True]


def test_accumulation_and_recompute_change_no_update():
    for name in ("sam", "sophia", "muon"):
        found = []
        for micro, recompute in ((4, "none"), (1, "full")):
            config = tiny("train.precision=fp64", f"engine.recompute={recompute}", *ALL[name])
            engine = build_engine(config, "single", ALONE)
            for step in (1, 2):
                rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
                train_step(engine, ALONE, rows[:, :-1], rows[:, 1:], step=step, lr=1e-2, seed=0, micro=micro)
            found.append(engine.whole("head.weight"))
        assert torch.allclose(*found, atol=1e-12), name


def test_independent_decay_does_not_depend_on_the_peak_rate():
    found = []
    for lr in (1e-6, 1e-9):
        config = configuration("model.method=pre_ln", "train.independent_decay=true", f"train.lr={lr}")
        parameters, own_roles = parameters_and_roles()
        optimizer = make_optimizer(parameters, own_roles, config.train, config.model)
        set_learning_rate(optimizer, lr / 2)
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found.append(parameters["head.weight"].detach())
    wanted = parameters_and_roles()[0]["head.weight"].detach() * (1 - 0.5 * 0.1)
    assert all(torch.allclose(each, wanted, rtol=1e-12) for each in found)


def test_qk_clip_brings_logits_to_the_bound():
    config = tiny("train.optimizer=muon", "train.muon.qk_clip=0.05", "train.precision=fp64")
    engine = build_engine(config, "single", ALONE)
    assert isinstance(engine, TorchEngine)
    body = next(part for part in engine.module.modules() if isinstance(part, Attention))
    rows = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(0))

    def step(lr: float) -> torch.Tensor:
        train_step(engine, ALONE, rows[:, :-1], rows[:, 1:], step=1, lr=lr, seed=0, micro=2)
        assert body.largest_logits is not None
        return body.largest_logits.clone()

    assert float(step(0.0).max()) > 0.05
    after = step(0.0)
    assert float(after.max()) <= 0.05 * (1 + 1e-9)


def test_moving_average_of_the_weights():
    config = tiny("train.ema=0.8", "train.precision=fp64")
    engine = build_engine(config, "single", ALONE)
    average = engine.whole("head.weight")
    for step in range(1, 25):
        one_step(engine, step)
        decay = min(0.8, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * engine.whole("head.weight")
    assert torch.allclose(engine.tensors()["optim.head.weight.ema"], average, atol=1e-7)


def test_state_that_starts_as_weights_follows_those_that_are_set():
    config = tiny("train.optimizer=schedule_free", "train.schedule=constant")
    engine = build_engine(config, "single", ALONE)
    with torch.no_grad():
        engine.tensors()["model.head.weight"].fill_(2.0)
    engine.loaded(weights_alone=True)
    assert bool((engine.tensors()["optim.head.weight.z"] == 2).all())
    assert isinstance(engine, TorchEngine) and engine.optimizer is not None
    follow_weights(engine.optimizer, config.train)


def test_newton_schulz_makes_singular_values_about_one():
    for shape in ((12, 5), (5, 12), (8, 8)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = torch.linalg.svdvals(newton_schulz(matrix, 5))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3, shape


def test_owners_share_the_work_and_buckets_give_each_rank_one(monkeypatch: pytest.MonkeyPatch):
    from stablelm.engine.updates import owners as module

    shapes = [(8, 8)] * 4 + [(16, 16)]
    assert sorted(owners(shapes, 2)) == [0, 1, 1, 1, 1]
    monkeypatch.setattr(module, "BUCKET", 64)
    assert buckets(shapes, 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("name", ["lion", "stable_adamw", "eps_inside", "muon"])
def test_moments_in_bf16(name: str):
    engine = build_engine(tiny("train.moments=bf16", *ALL[name]), "single", ALONE)
    for step in (1, 2):
        one_step(engine, step)
    held = engine.tensors()
    kinds = {tensor.dtype for key, tensor in held.items() if key.startswith("optim.") and tensor.ndim}
    assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lion", "schedule_free", "eps_inside"])
def test_updates_in_the_backward_pass_are_the_ordinary_ones(name: str):
    found = []
    for more in ((), ("engine.optimizer_in_backward=true",)):
        config = tiny("train.grad_clip=0", "train.micro_batch_size=4", *ALL[name], *more)
        engine = build_engine(config, "single", ALONE)
        found.append(run_steps(engine, ALONE, config, 1, 3))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALL)
def test_the_plans_bytes_are_those_of_the_state(name: str):
    config = tiny(*ALL[name])
    engine = TorchEngine(config, "single", ALONE)
    held = sum(tensor.nbytes for key, tensor in engine.tensors().items() if key.startswith("optim.") and tensor.ndim)
    copies = find(config.train).copies() * sum(each.nbytes for each in engine.parameters().values())
    layout = rank_memory.make_layout(config, "single", 1, 1)
    assert rank_memory.resting(config, rank_memory.parameters(config), layout)["moments"] == held + copies


REFUSED = [
    (("train.optimizer=muon", "engine.kind=zero3"), "whose flat shards cut the matrices"),
    (("train.optimizer=sam", "engine.kind=zero1"), "moves between two passes"),
    (("train.optimizer=sophia", "engine.kind=zero2"), "a second one for the curvature"),
    (("train.optimizer=stable_adamw", "engine.kind=zero2"), "takes a mean"),
    (("train.optimizer=schedule_free",), "train.schedule=cosine contradicts"),
    (("train.optimizer=lion", "train.moments=int8"), "train.moments=int8 is for AdamW's own moments"),
    (("train.optimizer=sam", "train.moments=bf16"), "more than averages of gradients"),
    (("train.muon.momentum=0.9",), "train.muon.momentum=0.9 means nothing to train.optimizer=adamw"),
    (("train.optimizer=lion", "train.eps_inside=true"), "train.eps_inside=true means nothing"),
    (("train.optimizer=sam", "engine.optimizer_in_backward=true", "train.grad_clip=0"), "needs all gradients at once"),
    (("train.optimizer=muon", "train.muon.qk_clip=50", "model.method=sigma_reparam"), "whose norm means nothing"),
    (("train.optimizer=muon", "train.muon.qk_clip=50", "model.method=qk_norm"), "normalises queries and keys"),
    (("train.optimizer=muon", "train.muon.qk_clip=50", "engine.recompute=selective"), "would keep the logits"),
    (("train.optimizer=schedule_free", "train.schedule=constant", "train.ema=0.9"), "averages already"),
    (("evaluate.average=ema",), "set train.ema"),
    (("evaluate.average=last:9",), "raise it to 9"),
    (("evaluate.average=some",), "must be none, ema or last:K"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(overrides: tuple[str, ...], words: str):
    with pytest.raises(ConfigError, match=words):
        configuration("model.method=pre_ln", *overrides)


def losses(rank: int, world_size: int, kind: str, overrides: tuple[str, ...], folder: str, source: str) -> list[float]:
    """Three steps saved, or three more after those that were saved by `source`."""
    ranks, config = make_ranks(rank, world_size), configuration("model.n_layers=2", *overrides)
    engine = build_engine(config, kind, ranks)
    if source:
        load_tensors(Path(folder) / source, engine.tensors(), ranks.cpu_group)
        engine.loaded()
    first = 4 if source else 1
    found = run_steps(engine, ranks, config, first, first + 2, micro=BATCH // world_size // 2)
    if not source:
        save_tensors(Path(folder) / f"{kind}-{world_size}", engine.tensors(), ranks.cpu_group)
    return found


SHARDED = {name: ("train.lr=1e-3", "train.precision=fp64", *overrides) for name, overrides in ALL.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_is_one_process_and_each_continues_the_other(name: str, tmp_path: Path):
    method = "model.method=pre_ln" if name == "qk_clip" else "model.method=magneto_sigma"
    arguments = ((method, *SHARDED[name]), str(tmp_path))
    alone = losses(0, 1, "single", *arguments, "")
    together: list[float] = launch(losses, 2, "fsdp2", *arguments, "")  # type: ignore[assignment]
    assert worst(together, alone) < 1e-9
    wanted = losses(0, 1, "single", *arguments, "single-1")
    assert worst(losses(0, 1, "single", *arguments, "fsdp2-2"), wanted) < 1e-9
    assert worst(launch(losses, 2, "fsdp2", *arguments, "single-1"), wanted) < 1e-9  # type: ignore[arg-type]
    assert launch(losses, 2, "fsdp2", *arguments, "fsdp2-2") == launch(losses, 2, "fsdp2", *arguments, "fsdp2-2")


def muon_step(rank: int, world_size: int) -> tuple[int, list[float]]:
    """All-to-alls of two steps on shards of different sizes, and their losses."""
    ranks, config = make_ranks(rank, world_size), configuration("model.n_layers=2", *SHARDED["muon"])
    engine, calls, exchange = build_engine(config, "fsdp2", ranks), [], torch.distributed.all_to_all_single

    def counted(*arguments, **options):
        calls.append(1)
        return exchange(*arguments, **options)

    torch.distributed.all_to_all_single = counted
    found = run_steps(engine, ranks, config, 1, 2, micro=BATCH // world_size // 2)
    return len(calls), found


@pytest.mark.slow
def test_matrices_take_one_exchange_there_and_one_back():
    config = configuration("model.n_layers=2", *SHARDED["muon"])
    layout = rank_memory.make_layout(config, "fsdp2", 3, 1)
    planned = collectives(config, rank_memory.parameters(config), layout).counts["all_to_all"]
    counted, found = launch(muon_step, 3)
    alone = run_steps(build_engine(config, "single", ALONE), ALONE, config, 1, 2, micro=BATCH // 2)
    assert counted == 2 * planned
    assert worst(found, alone) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "sophia", "muon"])
def test_ddp_is_one_process(name: str, tmp_path: Path):
    arguments = (("model.method=magneto_sigma", *SHARDED[name]), str(tmp_path), "")
    assert worst(launch(losses, 2, "ddp", *arguments), losses(0, 1, "single", *arguments)) < 1e-9  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion", "eps_inside", "schedule_free", "ema"])
def test_zero_is_one_process_and_continues_it(name: str, tmp_path: Path):
    arguments = (("train.lr=1e-3", *ALL[name]), str(tmp_path))
    alone = losses(0, 1, "single", *arguments, "")
    wanted = losses(0, 1, "single", *arguments, "single-1")
    for kind in ("zero1", "zero3"):
        assert worst(launch(losses, 2, kind, *arguments, ""), alone) < 1e-5  # type: ignore[arg-type]
        assert worst(launch(losses, 2, kind, *arguments, "single-1"), wanted) < 1e-5  # type: ignore[arg-type]
        assert worst(losses(0, 1, "single", *arguments, f"{kind}-2"), wanted) < 1e-5


def test_a_sequence_is_a_row_of_draws_in_any_world():
    whole = draws_of(0, 3, range(4), ALONE, SEQ)
    parts = [draws_of(0, 3, range(2), make_ranks(rank, 2), SEQ) for rank in (0, 1)]
    assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])
