"""The quickest parser of JSON there is: orjson's, or Python's own with the same strictness where that is missing."""

import json
from typing import Any

JSONDecodeError = json.JSONDecodeError
"""orjson's is one of these."""

try:
    from orjson import loads as loads
except ImportError:

    def loads(content: bytes | bytearray | memoryview | str, /) -> Any:
        """The value of JSON in UTF-8. Raises JSONDecodeError."""
        try:
            text = content if isinstance(content, str) else bytes(content).decode()
            return json.loads(text, parse_constant=_refused)
        except (UnicodeDecodeError, RecursionError) as error:
            raise JSONDecodeError(str(error), "", 0) from None

    def _refused(name: str) -> None:
        raise JSONDecodeError(f"{name} is not JSON", name, 0)
