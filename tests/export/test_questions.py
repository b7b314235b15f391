"""What axis values answer for export: nothing is written that an architecture does not compute."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from stablelm.config.schema import ModelConfig
from stablelm.methods import catalogue
from stablelm.methods.axes import Activation, NormKind, Position, Shaping, Stream, ValueMixing


@dataclass(frozen=True)
class Halved(Stream):
    """A stream that writes in its own way."""

    name: ClassVar[str] = "halved"

    def write(self, chunks: Any, branch: Any, added: Any) -> Any:
        return ((chunks[0] + branch) / 2,)


@dataclass(frozen=True)
class HalvedAndSaid(Halved):
    def trained_gains(self, model: Any, sublayer: int, added: Any) -> tuple[float, float]:
        return 0.5, 0.5


@dataclass(frozen=True)
class ReadsElsewhere(HalvedAndSaid):
    def read(self, chunks: Any, added: Any) -> Any:
        return chunks[0] * 2


def model() -> ModelConfig:
    return catalogue.apply_method(ModelConfig())


def test_a_stream_that_writes_in_its_own_way_says_its_gains_or_is_not_exported():
    assert "model.stream=halved" in str(Halved().export_obstacle(model()))
    assert HalvedAndSaid().export_obstacle(model()) is None
    assert "model.stream=halved" in str(ReadsElsewhere().export_obstacle(model()))


@pytest.mark.parametrize("kind", [NormKind, Activation, Position])
def test_a_new_value_is_in_no_architecture_until_it_says_so(kind: Any):
    assert kind.standard is None


def test_mixed_values_and_fixed_biases_are_in_no_architecture():
    mixing = type("Mixing", (ValueMixing,), {"name": "mixing", "share": 0.3})()
    shaping = type("Shaped", (Shaping,), {"name": "shaped", "active": True})()
    assert "mixed" in str(mixing.export_obstacle(model()))
    assert "bias" in str(shaping.export_obstacle(model()))
