"""What to plan, checked: a configuration, resolved for a number of ranks that need not exist."""

import math
from dataclasses import dataclass, replace

from stablelm.config import rules
from stablelm.config.load import Loaded
from stablelm.config.memory_rules import RESERVE
from stablelm.config.schema import Config
from stablelm.engine.launch_environment import AccelerateFlags, engine_kind
from stablelm.errors import ConfigError
from stablelm.observe.accelerators import Accelerator, find


@dataclass(frozen=True)
class PlanRequest:
    """`config` is `loaded` resolved, its `engine.kind` concrete; `price`: dollars per GPU-hour, None if unknown."""

    config: Config
    world_size: int
    accelerator: Accelerator
    gpus_per_node: int
    simulated: bool
    price: float | None
    loaded: Loaded

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.gpus_per_node)

    @property
    def sequences(self) -> int:
        """Of all steps of the run, whose batch sizes may differ."""
        return self.loaded.config.train.batch_sizes.before(self.config.train.steps or 0)

    @property
    def batch(self) -> str:
        """Sequences of a step, in words."""
        ramp = len(self.loaded.config.train.batch_sizes.stages) > 1
        return f"{'up to ' * ramp}{self.config.train.batch_sizes.largest:,} sequences"

    @property
    def usable(self) -> float:
        """Bytes of a device that tensors can use."""
        return self.accelerator.memory - RESERVE

    def at_depth(self, n_layers: int) -> "PlanRequest":
        """The same with another number of layers; ConfigError where the method or another key does not allow it."""
        model = replace(self.loaded.config.model, n_layers=n_layers, vocab_size=self.config.model.vocab_size)
        settled = self.config.engine
        engine = replace(self.loaded.config.engine, recompute=settled.recompute, accumulate=settled.accumulate)
        loaded = replace(self.loaded, config=replace(self.loaded.config, model=model, engine=engine))
        return prepare(
            loaded, self.world_size, self.accelerator, self.gpus_per_node, simulated=self.simulated, price=self.price
        )


def prepare(
    loaded: Loaded,
    world_size: int,
    gpu: str | Accelerator,
    gpus_per_node: int,
    *,
    simulated: bool = True,
    price: float | None = None,
) -> PlanRequest:
    """Checks the arguments and resolves the configuration for that many ranks; ConfigError in one sentence a mistake.

    `gpu`: a name in the table of accelerators, or a description. The tokenizer is read only if `model.vocab_size` is
    not set.
    """
    accelerator = find(gpu) if isinstance(gpu, str) else gpu
    for name, value in (("--world-size", world_size), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
    if price is not None and not 0 < price < math.inf:
        raise ConfigError(f"--price {price:g} must be a positive number of dollars per GPU-hour")
    if world_size > gpus_per_node and world_size % gpus_per_node:
        raise ConfigError(
            f"--world-size {world_size} does not fill nodes of --gpus-per-node {gpus_per_node}; "
            f"use {world_size // gpus_per_node * gpus_per_node} or {-(-world_size // gpus_per_node) * gpus_per_node}"
        )
    config = loaded.config
    kind = engine_kind(config.engine.kind, AccelerateFlags(), world_size)
    config = replace(config, engine=replace(config.engine, kind=kind))
    rules.check(config, world_size, None, loaded.origins)
    config = rules.resolve(
        config, pieces=_pieces(config), world_size=world_size, accelerate_precision=None, origins=loaded.origins
    )
    # Memory and rate are those of the largest step of a ramp.
    config = replace(config, train=replace(config.train, global_batch_size=config.train.batch_sizes.largest))
    return PlanRequest(config, world_size, accelerator, gpus_per_node, simulated, price, loaded)


def prepare_each(
    loaded: Loaded,
    world_sizes: tuple[int, ...],
    gpu: str | Accelerator,
    gpus_per_node: int,
    *,
    simulated: bool = True,
    price: float | None = None,
) -> tuple[dict[int, PlanRequest], dict[int, str]]:
    """The requests by number of ranks, and for numbers that cannot be the reason; ConfigError where none can be."""
    requests, problems = {}, {}
    for ranks in world_sizes:
        try:
            requests[ranks] = prepare(loaded, ranks, gpu, gpus_per_node, simulated=simulated, price=price)
        except ConfigError as error:
            problems[ranks] = str(error)
    if not requests:
        raise ConfigError("\n".join(dict.fromkeys(line for found in problems.values() for line in found.splitlines())))
    return requests, problems


def _pieces(config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from stablelm.data.corpus import configured_tokenizer

    data = config.data
    return configured_tokenizer(data).pieces
