"""The mode that `engine.recompute: auto` stands for: the cheapest whose predicted peak fits the memory of a rank."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from stablelm.config import memory_rules
from stablelm.config.schema import Config
from stablelm.engine.peak_memory import estimate, rank_memory
from stablelm.engine.peak_memory.limit import available
from stablelm.engine.peak_memory.rank_memory import Layout
from stablelm.engine.ranks import Ranks
from stablelm.errors import ConfigError
from stablelm.optimizers.catalogue import find

MODES = ("none", "selective", "every:4", "attention", "every:2", "full")
"""By what they compute again: nothing, no matmul, a quarter of the layers, a third of each, half of them, all."""


@dataclass(frozen=True)
class Choice:
    """`peaks`: predicted peak bytes of a rank by mode, the cheapest first."""

    peaks: dict[str, int]
    limit: float

    @property
    def leanest(self) -> str:
        return min(self.peaks, key=self.peaks.__getitem__)

    @property
    def mode(self) -> str:
        """The first that fits, or where none does the leanest."""
        return next((mode for mode, peak in self.peaks.items() if peak <= self.limit), self.leanest)

    @property
    def fits(self) -> bool:
        return self.peaks[self.mode] <= self.limit

    def words(self) -> str:
        """The choice in a line."""
        tried = ", ".join(f"{mode} {_size(peak)}" for mode, peak in self.peaks.items())
        return f"{self.mode}; predicted peak of a rank: {tried}; limit {_size(self.limit)}"


def with_mode(config: Config, mode: str) -> Config:
    """The config with that mode of recompute."""
    return replace(config, engine=replace(config.engine, recompute=mode))


def choose(config: Config, layout: Layout, limit: float, *, all_modes: bool = False) -> Choice:
    """Of a resolved config; predicts no more modes than it takes, or all of them."""
    listed, peaks = rank_memory.parameters(config), {}
    for tried in _legal(replace(config, engine=replace(config.engine, kind=layout.kind))):
        peaks[tried.engine.recompute] = estimate.peak(tried, listed, layout).total()
        if peaks[tried.engine.recompute] <= limit and not all_modes:
            break
    return Choice(peaks, limit)


def _legal(config: Config) -> Iterator[Config]:
    for mode in MODES:
        tried = with_mode(config, mode)
        each = memory_rules.period(mode)
        if (each or 1) <= config.model.n_layers and not list(memory_rules.selective_problems(tried, config.model)):
            yield tried


def resolved(config: Config, kind: str, ranks: Ranks) -> tuple[Config, str]:
    """A resolved config with a concrete mode in place of auto, and a line about it ('' if there was none). Collective.

    Raises ConfigError where no mode fits.
    """
    if config.engine.recompute != "auto":
        return config, ""
    # The rank with the least memory decides for all.
    limit = min(ranks.gather(config.engine.memory_limit or available(ranks)))
    layout = rank_memory.make_layout(config, kind, ranks.world_size, ranks.nodes, ranks.device.type)
    choice = ranks.consensus().first(lambda: choose(config, layout, limit))
    if not choice.fits:
        raise ConfigError(_too_large(config, choice))
    return with_mode(config, choice.mode), f"engine.recompute=auto is {choice.words()}"


def _too_large(config: Config, choice: Choice) -> str:
    limit = "engine.memory_limit" if config.engine.memory_limit else "the available memory"
    micro = config.train.micro_batch_size or 1
    fixes = [f"train.micro_batch_size={micro // 2}"] if micro > 1 else []
    smaller = config.train.moments == "fp32" and find(config.train).rounds
    fixes += ["train.moments=bf16"] if smaller else []
    fixes += ["more processes with engine.kind=fsdp2", "fewer layers"]
    return (
        f"engine.recompute=auto: the predicted peak of a rank is {_size(choice.peaks[choice.leanest])} with "
        f"{choice.leanest}, the leanest mode, and {limit} is {_size(choice.limit)}; use {' or '.join(fixes)} "
        "(stablelm plan shows what takes the memory)"
    )


def _size(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.2f} GB"
