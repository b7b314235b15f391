"""config.json of another program's model, key by key: read as transformers reads it, checked before it is believed."""

from typing import Any

from stablelm.errors import ConfigError
from stablelm.export.importing.source_folder import SourceFolder
from stablelm.methods import catalogue

LARGEST = 1 << 31
ALIASES = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
"""Names of the same function."""
SCALED = ("linear", "llama3", "yarn")
"""Kinds of scaled rotary positions that a factor of 1 leaves as they are."""


class SourceKeys:
    """Raises ConfigError that names the key and its value; a key that is null or missing has its default."""

    def __init__(self, folder: SourceFolder):
        self.values, self.path = folder.config, folder.path / "config.json"

    def wrong(self, name: str, why: str) -> ConfigError:
        return ConfigError(f"{self.path}: {name}={self.values.get(name)!r:.100} {why}")

    def size(self, name: str, default: int | None = None) -> int:
        """A number of things, at least 1; without a default it must be there."""
        value = self._or(name, default)
        if value is None:
            raise ConfigError(f"{self.path} lacks {name}; name the folder of a whole model")
        if type(value) is not int or not 1 <= value < LARGEST:
            raise self.wrong(name, "must be an integer of at least 1")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._or(name, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.wrong(name, "must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._or(name, default)
        if type(value) is not bool:
            raise self.wrong(name, "must be true or false")
        return value

    def word(self, name: str, default: str) -> str:
        value = self._or(name, default)
        if type(value) is not str:
            raise self.wrong(name, "must be a string")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._or(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "must be an object or null")
        return value

    def eos(self) -> tuple[int, ...]:
        """The ids that end a text; none if it does not say."""
        value = self._or("eos_token_id", [])
        found = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in found):
            raise self.wrong("eos_token_id", "must be an id or a list of ids")
        return tuple(found)

    def activation(self, name: str, default: str, *, gated: bool) -> str:
        """Our name of the activation."""
        asked = self.word(name, default)
        values: dict[str, Any] = catalogue.values("activation")
        known = {value.standard: key for key, value in values.items() if value.gated == gated and value.standard}
        if ALIASES.get(asked, asked) not in known:
            raise self.wrong(name, f"is no activation of ours; import a model with {', '.join(sorted(known))}")
        return known[ALIASES.get(asked, asked)]

    def rope_base(self, positions: int) -> float:
        """The base of plain rotary positions. ConfigError where they are scaled up to `positions`, or partial."""
        section = next((name for name in ("rope_parameters", "rope_scaling") if self.values.get(name)), "")
        given = self.mapping(section) if section else {}
        base = given.get("rope_theta", self._or("rope_theta", 10000.0))
        if type(base) not in (int, float) or not base > 0:
            raise ConfigError(f"{self.path}: rope_theta={base!r:.100} must be a number above 0")
        if given.get("partial_rotary_factor", self._or("partial_rotary_factor", 1.0)) != 1:
            raise ConfigError(f"{self.path}: partial_rotary_factor must be 1, as our positions turn whole heads")
        kind = given.get("rope_type", given.get("type", "default"))
        plain = kind == "default" or (kind in SCALED and given.get("factor") == 1 and not given.get("attention_factor"))
        if kind == "dynamic":
            known = given.get("original_max_position_embeddings") or self._or("max_position_embeddings", positions)
            if positions > known:
                raise self.wrong(section, f"changes positions beyond {known}; import it with model.max_seq_len={known}")
        elif not plain:
            raise self.wrong(section, "scales the rotary frequencies, which ours do not; import a model without it")
        return float(base)

    def refuse_window(self, positions: int) -> None:
        """ConfigError where `sliding_window` lets attention see fewer than `positions` back, which ours does not."""
        if "sliding_window" in self.values and self.values["sliding_window"] is None:
            return
        window = self.size("sliding_window", 4096)
        if window < positions:
            raise ConfigError(
                f"{self.path}: sliding_window={window} is below its {positions} positions, and our attention sees all "
                f"of them; import it with model.max_seq_len={window}, within which they are the same"
            )

    def _or(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value
