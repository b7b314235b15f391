"""How a text goes on and when it ends, and the numbers that draw it (torch-free)."""

import math
from dataclasses import dataclass

import numpy as np

from stablelm.errors import ConfigError
from stablelm.seeds import seed_from


@dataclass(frozen=True)
class Sampling:
    """How a text goes on, and when it ends. Raises ConfigError for values that mean nothing.

    `temperature`: divides the logits, 0 takes the likeliest token; `top_k`: only so many likeliest tokens, 0: all;
    `top_p`: only the likeliest tokens that together have this probability (Holtzman et al., ICLR 2020), at least one;
    `repetition_penalty`: logits of tokens that the prompt or the text has are divided by it if positive, else
    multiplied (Keskar et al. 2019, CTRL). `stop`: strings before which the text ends.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0; 0 takes the likeliest token"),
            ("top_k", self.top_k >= 0, "at least 0; 0 takes all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing"),
            ("stop", "" not in self.stop, "strings that are not empty"),
            ("seed", 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        )
        wrong = [f"{name}={getattr(self, name)} must be {words}" for name, holds, words in checks if not holds]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def check_samples(self, samples: int) -> None:
        """Raises ConfigError for several samples of a prompt that would all be the same text."""
        equal = "temperature=0" if self.temperature == 0 else "top_k=1" if self.top_k == 1 else ""
        if equal and samples > 1:
            raise ConfigError(
                f"samples={samples} texts of a prompt are equal with {equal}, which always takes the likeliest token; "
                "ask for samples=1, or draw tokens by temperature=1 and top_k=0"
            )


def uniforms(seed: int, prompt: list[int], number: int) -> np.random.Generator:
    """What draws the tokens of a prompt's sample number `number`, whatever else is in the batch or in the call."""
    return np.random.Generator(np.random.PCG64(seed_from("sample", seed, *prompt, number)))


def check_counts(**counts: int) -> None:
    """Raises ConfigError for a number that is below 1."""
    wrong = [f"{name}={count} must be at least 1" for name, count in counts.items() if count < 1]
    if wrong:
        raise ConfigError("\n".join(wrong))
