"""Rules of `train.optimizer` and of averaged weights, between themselves and with engines, moments and passes."""

from collections.abc import Iterator
from dataclasses import fields

from stablelm.config import averages
from stablelm.config.engine_rules import ZERO
from stablelm.config.schema import Config, ModelConfig
from stablelm.errors import ConfigError
from stablelm.optimizers import catalogue
from stablelm.optimizers.muon import MuonUpdate

Problem = tuple[str, tuple[str, ...]]


def problems(config: Config) -> Iterator[Problem]:
    """A sentence and the keys to blame for each broken rule; `engine.kind` may still be `auto`."""
    yield from _options(config)
    yield from _engine(config)
    yield from _storage(config)
    yield from _average(config)
    for refusal in catalogue.find(config.train).refusals(config):
        yield refusal.reason, refusal.keys


def model_problems(config: Config, model: ModelConfig) -> Iterator[Problem]:
    """`model` has its axes."""
    found = catalogue.OPTIMIZERS[catalogue.update_name(config.train)](config.train)
    if isinstance(found, MuonUpdate):
        for refusal in found.model_refusals(model):
            yield refusal.reason, refusal.keys


def _options(config: Config) -> Iterator[Problem]:
    """Options that another optimizer has."""
    train = config.train
    used = {train.optimizer, catalogue.update_name(train)}
    for section, names in catalogue.SECTIONS.items():
        options = getattr(train, section)
        given = [
            each.name for each in fields(options) if getattr(options, each.name) != getattr(type(options)(), each.name)
        ]
        if used.isdisjoint(names):
            for name in given:
                key = f"train.{section}.{name}"
                yield (
                    f"{key}={getattr(options, name)} means nothing to train.optimizer={train.optimizer}; leave it out, "
                    f"or use train.optimizer={names[0]}",
                    (key, "train.optimizer"),
                )
    if train.eps_inside and catalogue.update_name(train) not in ("adamw", "muon"):
        yield (
            f"train.eps_inside=true means nothing to train.optimizer={train.optimizer}; leave it out, or use "
            "train.optimizer=adamw",
            ("train.eps_inside", "train.optimizer"),
        )


def _engine(config: Config) -> Iterator[Problem]:
    train, kind = config.train, config.engine.kind
    update = catalogue.find(train)
    if kind in ZERO and update.zero_obstacle:
        yield (
            f"train.optimizer={train.optimizer} is not possible under engine.kind={kind}, whose flat shards "
            f"{update.zero_obstacle}; use fsdp2, hsdp, ddp or single",
            ("train.optimizer", "engine.kind"),
        )
    if config.engine.optimizer_in_backward and update.backward_obstacle:
        yield (
            f"engine.optimizer_in_backward=true is not possible with train.optimizer={train.optimizer}, which "
            f"{update.backward_obstacle}; leave one of them out",
            ("engine.optimizer_in_backward", "train.optimizer"),
        )


def _storage(config: Config) -> Iterator[Problem]:
    """State in fewer bytes."""
    train = config.train
    if train.moments == "fp32":
        return
    blame, fused = ("train.moments", "train.optimizer"), catalogue.fused(train)
    if train.moments == "int8" and not fused:
        what = "train.eps_inside=true" if train.eps_inside else f"train.optimizer={train.optimizer}"
        yield (
            f"train.moments=int8 is for AdamW's own moments, and not possible with {what}; use train.moments=bf16 or "
            "fp32",
            blame,
        )
    elif train.optimizer != "adamw" and not catalogue.find(train).rounds:
        yield (
            f"train.moments={train.moments} is not possible with train.optimizer={train.optimizer}, whose state holds "
            "more than averages of gradients; use train.moments=fp32",
            blame,
        )


def _average(config: Config) -> Iterator[Problem]:
    train, asked = config.train, config.evaluate.average
    free = catalogue.find(train).evaluation_state()
    if train.ema and free:
        yield (
            f"train.ema={train.ema} averages what train.optimizer={train.optimizer} averages already; leave it out",
            ("train.ema", "train.optimizer"),
        )
    if train.ema and config.engine.optimizer_in_backward:
        yield (
            f"train.ema={train.ema} is not possible with engine.optimizer_in_backward=true, which may update some "
            "parameters of a step alone; leave one of them out",
            ("train.ema", "engine.optimizer_in_backward"),
        )
    if asked is None:
        return
    try:
        average = averages.parse(asked)
    except ConfigError as error:
        yield str(error), ("evaluate.average",)
        return
    if average.kind == averages.EMA and not train.ema:
        yield (
            "evaluate.average=ema needs an average that the run keeps; set train.ema, for instance to 0.999",
            ("evaluate.average", "train.ema"),
        )
    if average.kind == "last" and free:
        yield (
            f"evaluate.average={asked} averages what train.optimizer={train.optimizer} averages already; leave it out",
            ("evaluate.average", "train.optimizer"),
        )
    if average.kind == "last" and config.checkpoint.keep < average.checkpoints:
        yield (
            f"evaluate.average={asked} needs {average.checkpoints} checkpoints, and checkpoint.keep="
            f"{config.checkpoint.keep}; raise it to {average.checkpoints}",
            ("evaluate.average", "checkpoint.keep"),
        )
