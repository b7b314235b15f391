"""The engine of a kind; DeepSpeed is imported only where it is asked for."""

from stablelm.config.engine_rules import ZERO
from stablelm.config.schema import Config
from stablelm.engine.interface import Engine
from stablelm.engine.ranks import Ranks


def build_engine(config: Config, kind: str, ranks: Ranks, *, train: bool = True) -> Engine:
    """The model of a resolved `config` spread over `ranks`, with its optimizer unless `train` is False.

    Collective. Raises ConfigError for what the machine lacks.
    """
    if kind in ZERO:
        from stablelm.engine.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, kind, ranks, train=train)
    from stablelm.engine.torch_engine import TorchEngine

    return TorchEngine(config, kind, ranks, train=train)
