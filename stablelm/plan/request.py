"""What to plan, checked: a configuration, resolved for a number of ranks that need not exist."""

from dataclasses import dataclass, replace

from stablelm.config import rules
from stablelm.config.load import Loaded
from stablelm.config.schema import Config
from stablelm.engine.launch_environment import AccelerateFlags, engine_kind
from stablelm.errors import ConfigError
from stablelm.observe.accelerators import Accelerator, find


@dataclass(frozen=True)
class PlanRequest:
    """`config` is resolved and its `engine.kind` concrete."""

    config: Config
    world_size: int
    accelerator: Accelerator
    gpus_per_node: int
    simulated: bool

    @property
    def nodes(self) -> int:
        return max(1, self.world_size // self.gpus_per_node)


def prepare(loaded: Loaded, world_size: int, gpu: str, gpus_per_node: int, *, simulated: bool = True) -> PlanRequest:
    """Checks the arguments and resolves the configuration for that many ranks; ConfigError in one sentence a mistake.

    The tokenizer is read only if `model.vocab_size` is not set.
    """
    accelerator = find(gpu)
    for name, value in (("--world-size", world_size), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ConfigError(f"{name} {value} must be at least 1")
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
    # Memory and time are those of the largest step of a ramp.
    config = replace(config, train=replace(config.train, global_batch_size=config.train.batch_sizes.largest))
    return PlanRequest(config, world_size, accelerator, gpus_per_node, simulated)


def _pieces(config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from stablelm.data.embedded import configured_tokenizer

    data = config.data
    return configured_tokenizer(data).pieces
