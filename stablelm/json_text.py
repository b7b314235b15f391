"""JSON that is read back from a disk or a store, where anybody may have changed it: checked before it is believed.

The standard parser takes what JSON does not know (NaN, 1e400 as infinity, a name twice, numbers of any length), and
pydantic alone keeps the last of two equal names; both are needed.
"""

import json
import math
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of steps, tokens or bytes."""
Number = int | float


def parse(content: bytes | str, kind: type[T]) -> T:
    """The value of JSON text, of exactly the type `kind`: a TypedDict, a BaseModel, list[...], dict[...].

    Raises ValueError with what is wrong in a phrase.
    """
    return checked(load(content), kind)


def parse_into(content: bytes | str, kind: type[T]) -> T:
    """As `parse`, of a type that has dataclasses or tuples in it; strings that are not Unicode are an error."""
    load(content)
    return _phrased(lambda: _adapter(kind).validate_json(content, strict=True))


def checked(value: Any, kind: type[T]) -> T:
    """`value`, if it is of exactly the type `kind`. Raises ValueError as `parse` does."""
    return _phrased(lambda: _adapter(kind).validate_python(value, strict=True))


def _phrased(validate: Callable[[], T]) -> T:
    try:
        return validate()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise ValueError(f"{place}: {first['msg'][:200]}" if place else first["msg"][:200]) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load(content: bytes | str) -> Any:
    """The value of JSON text. Raises ValueError for text that is not UTF-8 or not JSON to the letter."""
    try:
        text = content if isinstance(content, str) else content.decode()
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}" if text else "empty") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def as_number(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become the strings nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: as_number(inner) for name, inner in value.items()}
    return value


@cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number of JSON")


def _float(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"the number {word[:20]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r:.60} is given twice")
    return found
