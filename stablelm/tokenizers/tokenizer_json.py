"""The content of a tokenizer.json, which may come from anybody: what is wrong with it, in a sentence."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import tokenizers

from stablelm import json_text
from stablelm.errors import ConfigError

T = TypeVar("T")
SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
PLAIN_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
# Times by which normalizers may lengthen a text: those in use write a space as three bytes.
MOST_GROWTH = 64


def read(content: bytes, path: str, key: str) -> dict[str, Any]:
    """The file's sections. Raises ConfigError under `key`."""
    try:
        described = json_text.parse(content, dict[str, Any])
    except ValueError as error:
        raise _bad(path, key, str(error)) from None
    if not isinstance(described.get("model"), dict):
        raise _bad(path, key, "it has no section 'model'")
    return described


def load(content: bytes, described: Mapping[str, Any], path: str, key: str) -> tokenizers.Tokenizer:
    """The tokenizer, without truncation and padding, for which special tokens in a text are text.

    Raises ConfigError under `key` for what the library does not know or what is not the same at every call.
    """
    _check(described, path, key)
    try:
        made = guarded(lambda: tokenizers.Tokenizer.from_str(content.decode()))
    except ValueError as error:
        raise _bad(path, key, _cause(described) or str(error)) from None
    known = {number: token.content for number, token in made.get_added_tokens_decoder().items()}
    for token in described.get("added_tokens") or ():
        if known.get(token["id"]) != token["content"]:
            raise _bad(path, key, f"the id {token['id']} of the added token {token['content']!r:.60} is not free")
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    return made


def unknown(described: Mapping[str, Any], vocabulary: Mapping[str, int]) -> int | None:
    """Id of the token for what no piece can write."""
    model = described["model"]
    if isinstance(model.get("unk_id"), int):
        return model["unk_id"]
    return vocabulary.get(model.get("unk_token") or "")


def guarded(work: Callable[[], T]) -> T:
    """The result of a call of the library. Raises ValueError, also where the library panics, which is no Exception."""
    try:
        return work()
    except Exception as error:
        raise ValueError(_words(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(_words(error)) from None


def _check(described: Mapping[str, Any], path: str, key: str) -> None:
    model = described["model"]
    for name, sampled in (("dropout", model.get("dropout")), ("alpha", model.get("alpha"))):
        if sampled:
            raise ConfigError(
                f"{key}: {path!r} encodes at random (model.{name} is {sampled!r:.20}), so a run could not be "
                f"repeated; set it to null in a copy of the file"
            )
    growth = 1
    for each in _sequence(described.get("normalizer")):
        growth *= _growth(each)
    if growth > MOST_GROWTH:
        raise _bad(path, key, f"its normalizers may make a text {growth} times as long")


def _sequence(normalizer: Any) -> Iterator[Mapping[str, Any]]:
    """The normalizers in a section, those of nested sequences too."""
    waiting = [normalizer]
    while waiting:
        each = waiting.pop()
        if not isinstance(each, dict):
            continue
        if isinstance(each.get("normalizers"), list):
            waiting += each["normalizers"]
        else:
            yield each


def _growth(normalizer: Mapping[str, Any]) -> int:
    """Times by which one may lengthen a text; those that only rewrite characters do it by a bounded factor."""
    if normalizer.get("type") != "Replace":
        return 1
    pattern, content = normalizer.get("pattern"), normalizer.get("content")
    matched = pattern.get("String") if isinstance(pattern, dict) else None
    shortest = len(matched) if isinstance(matched, str) and matched else 1
    return max(1, -(-len(content) // shortest)) if isinstance(content, str) else 1


def _cause(described: Mapping[str, Any]) -> str | None:
    """Which section the library refuses when it stands alone."""
    for section in SECTIONS:
        alone: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": PLAIN_MODEL}
        alone[section] = described.get(section)
        try:
            guarded(lambda alone=alone: tokenizers.Tokenizer.from_str(json.dumps(alone)))
        except ValueError as error:
            return _component(section, described[section], str(error))
    return None


def _component(section: str, described: Any, reason: str) -> str:
    kind = described.get("type") if isinstance(described, dict) else None
    # The library answers so to every value that none of its components can be made of.
    if "did not match any variant" not in reason:
        return f"its {section}: {reason}"
    what = f"its {section} of type {kind!r:.60}" if kind is not None else f"its {section}"
    return f"{what} is not one that tokenizers {tokenizers.__version__} knows"


def _bad(path: str, key: str, reason: str) -> ConfigError:
    return ConfigError(f"{key}: {path!r} is not a tokenizer that can be used ({reason}); give another tokenizer.json")


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
