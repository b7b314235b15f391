"""Recomputation, updates in the backward pass and bytes of moments: what cannot be gets its sentence."""

import pytest
from test_config_rules import problems, resolve

HOOKS = ("engine.optimizer_in_backward=true", "train.grad_clip=0", "engine.kind=single")
START = "engine.optimizer_in_backward=true is not possible with"


@pytest.mark.parametrize("mode", ["none", "attention", "selective", "full", "every:1", "every:12", "auto"])
def test_modes_of_recompute(mode: str):
    assert resolve("model.n_layers=12", f"engine.recompute={mode}").engine.recompute == mode


@pytest.mark.parametrize("mode", ["every:0", "every:x", "every:13", "every:1000", "every:", "every:-1", "every:1.5"])
def test_every_needs_an_integer_up_to_the_layers(mode: str):
    (problem,) = problems("model.n_layers=12", f"engine.recompute={mode}")
    assert problem.startswith(
        f"engine.recompute={mode} must be every:K with an integer K from 1 to model.n_layers=12; use every:2"
    )


@pytest.mark.parametrize(
    ("mode", "meant"),
    [("ful", ", did you mean full?"), ("selctive", ", did you mean selective?"), ("every2", ", did you mean every:2?")],
)
def test_a_mode_that_is_nearly_one(mode: str, meant: str):
    (problem,) = problems(f"engine.recompute={mode}")
    assert f"engine.recompute={mode} must be none, attention, selective, full, every:K or auto{meant}" in problem


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("engine.recompute=selective", "train.compile=true", "model.method=catformer"),
            "engine.recompute=selective is not possible with train.compile=true and model.method=catformer",
        ),
        (
            ("engine.recompute=selective", "engine.kind=zero3"),
            "engine.recompute=selective is not possible under engine.kind=zero3",
        ),
        (("engine.memory_limit=0",), "engine.memory_limit=0.0 must be above 0"),
        (
            ("train.moments=int8", "engine.kind=zero2"),
            "train.moments=int8 is not possible under engine.kind=zero2",
        ),
        (("train.moments=bf16", "train.precision=fp64"), "train.moments=bf16 contradicts train.precision=fp64"),
        (
            ("train.moments=bf16", "train.betas=[0.9, 0.999]"),
            "train.moments=bf16 rounds away the decay of a moment whose constant is above 0.99, and "
            "train.betas=[0.9, 0.999]; use a smaller constant",
        ),
        (
            (*HOOKS, "train.grad_clip=1"),
            f"{START} train.grad_clip=1.0: it updates each parameter as soon",
        ),
        ((*HOOKS, "engine.kind=zero1"), f"{START} engine.kind=zero1: "),
        ((*HOOKS, "train.micro_batch_size=8"), f"{START} train.micro_batch_size=8: "),
        ((*HOOKS, "guards.spike=skip"), f"{START} guards.spike=skip: "),
        ((*HOOKS, "guards.recheck=true"), f"{START} guards.recheck=true: "),
        (
            (*HOOKS, "observe.metrics=[math:sqrt]"),
            f"{START} observe.metrics, which need all gradients before the",
        ),
    ],
)
def test_what_cannot_be(overrides: tuple[str, ...], message: str):
    (problem,) = problems(*overrides)
    assert problem.startswith(message)


def test_what_can_be():
    assert resolve(*HOOKS, "guards.spike=rewind", "train.micro_batch_size=32").engine.optimizer_in_backward
    assert resolve("train.moments=int8", "train.betas=[0.9, 0.999]").train.moments == "int8"
    assert resolve("engine.memory_limit=16e9", "engine.recompute=auto").engine.memory_limit == 16e9


def test_several_processes_are_refused_whatever_auto_becomes():
    (problem,) = problems("engine.optimizer_in_backward=true", "train.grad_clip=0", world_size=2)
    assert f"{START} engine.kind=auto on 2 processes: " in problem
