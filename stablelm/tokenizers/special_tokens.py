"""Which tokens begin and end a document: what the user asks for, and what files beside a tokenizer.json say."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stablelm import json_text
from stablelm.errors import ConfigError

# In the order in which they are asked. The last one is only kept where the others do not say it.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
# What a tokenizer.json without such a file calls them.
USUAL = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]"),
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the user asks for. `add_bos`: documents begin with bos; `eos_token`: its content, None: the tokenizer's own.

    `key` is the key or argument that names the tokenizer, for messages.
    """

    key: str = "data.tokenizer"
    add_bos: bool = False
    eos_token: str | None = None

    @property
    def eos_key(self) -> str:
        return self._beside("eos_token")

    def no_bos(self, path: str, *, fix: str = "leave it out") -> ConfigError:
        asked = self._beside("add_bos") + ("" if self.key.startswith("--") else "=true")
        return ConfigError(f"{asked}: {path!r} has no token that begins a document; {fix}")

    def _beside(self, name: str) -> str:
        return f"--{name.replace('_', '-')}" if self.key.startswith("--") else f"data.{name}"


def policy_hash(file_hash: str, eos: int, bos: int | None, add_bos: bool) -> str:
    """SHA-256, in hexadecimal, of a tokenizer file and of the tokens around a document."""
    policy = {"file": file_hash, "eos": eos, "bos": bos if add_bos else None}
    return hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class NamedToken:
    """`value`: the token's content, or its id; `file`: the file that names it, None where it is the usual name."""

    value: str | int
    file: str | None


def named(role: str, settings: Mapping[str, bytes], special: set[str], *, folder: str, key: str) -> NamedToken | None:
    """The token of a role ('eos' or 'bos') by the files beside a tokenizer.json, or by its usual name.

    `special`: contents of the special tokens. Raises ConfigError under `key` for a file that cannot be read so.
    """
    for file in SETTINGS:
        if file not in settings:
            continue
        try:
            found = json_text.parse(settings[file], dict[str, Any])
            value = _value(role, found, by_id=file == "generation_config.json")
        except ValueError as error:
            raise ConfigError(
                f"{key}: {file} in {folder!r} is not a tokenizer's settings ({error}); fix the file or remove it"
            ) from None
        if value is not None:
            return NamedToken(value, file)
    usual = [name for name in USUAL[role] if name in special]
    return NamedToken(usual[0], None) if len(usual) == 1 else None


def _value(role: str, settings: dict[str, Any], *, by_id: bool) -> str | int | None:
    value = settings.get(f"{role}_token_id" if by_id else f"{role}_token")
    if isinstance(value, dict):
        value = value.get("content")
    if by_id and isinstance(value, list) and value:
        value = value[0]
    wanted = int if by_id else str
    if value is None or (isinstance(value, wanted) and not isinstance(value, bool)):
        return value
    raise ValueError(f"{role}_token{'_id' if by_id else ''} is {str(value)[:40]!r}")
