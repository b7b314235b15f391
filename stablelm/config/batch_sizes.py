"""How many sequences each step takes: the same number, or one that changes at data steps (a ramp)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stablelm.errors import ConfigError

Given = int | Mapping[int, int]
"""A value of `train.global_batch_size`."""


@dataclass(frozen=True)
class BatchSizes:
    """`stages`: (first data step, sequences of each step from it on), ascending from step 0, neighbours different.

    Data steps count consumed batches from 0, so that a step's place in the data does not depend on what was skipped.
    """

    stages: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, given: Given) -> "BatchSizes":
        """Of a value for which `problem` is ''."""
        stages: list[tuple[int, int]] = []
        for step, size in [(0, given)] if isinstance(given, int) else sorted(given.items()):
            if not stages or stages[-1][1] != size:
                stages.append((step, size))
        return cls(tuple(stages))

    @classmethod
    def saved(cls, value: Any) -> "BatchSizes":
        """Of what `plain` gave and JSON kept, whose names are strings. ConfigError if it is damaged."""
        given = {int(step): size for step, size in value.items()} if isinstance(value, Mapping) else value
        if words := problem(given):
            raise ConfigError(f"in the run's identity {words}")
        return cls.of(given)

    def plain(self) -> int | dict[int, int]:
        """The shortest value that means the same."""
        return self.stages[0][1] if len(self.stages) == 1 else dict(self.stages)

    @property
    def first(self) -> int:
        """Sequences of step 0."""
        return self.stages[0][1]

    @property
    def largest(self) -> int:
        """Sequences of the largest step."""
        return max(size for _, size in self.stages)

    def at(self, step: int) -> int:
        """Sequences of a data step."""
        return next(size for first, size in reversed(self.stages) if first <= step)

    @cached_property
    def _begun(self) -> tuple[tuple[int, int, int], ...]:
        """(first data step, its first sample, sequences of each step) of each stage, the last stage first."""
        begun, samples = [], 0
        for (first, size), (stop, _) in zip(self.stages, (*self.stages[1:], (0, 0)), strict=True):
            begun.append((first, samples, size))
            samples += size * (stop - first)
        return tuple(reversed(begun))

    def samples(self, step: int) -> range:
        """The samples that a data step takes, by number."""
        for first, sample, size in self._begun:
            if first <= step:
                sample += (step - first) * size
                return range(sample, sample + size)
        raise AssertionError(f"step {step} is negative")

    def before(self, step: int) -> int:
        """Sequences of all earlier data steps."""
        return self.samples(step).start

    def step_of(self, sample: int) -> int:
        """The data step that takes this sample, both counted from 0."""
        return next(first + (sample - begun) // size for first, begun, size in self._begun if begun <= sample)

    def steps_for(self, samples: int) -> int:
        """Steps that take at least so many samples, which are at least 1."""
        return self.step_of(samples - 1) + 1


def problem(given: Given) -> str:
    """Why a value with sizes from 1 up cannot be used; '' if it can."""
    if isinstance(given, int) or 0 in given:
        return ""
    return f"train.global_batch_size={dict(given)} lacks the size of step 0; begin with it, as {{0: 32, 1000: 64}}"
