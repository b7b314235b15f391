"""ALiBi's slopes (Press et al., Train Short, Test Long, ICLR 2022; torch-free)."""

import math


def alibi_slopes(n_heads: int) -> list[float]:
    """Slope of each head: 2^(-8 h / n) for n a power of two, else those of the next smaller power and, between
    them, every other one of twice that power (released code)."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (head + 1) / power) for head in range(0, 2 * power, 2)]
    return slopes + between[: n_heads - power]
