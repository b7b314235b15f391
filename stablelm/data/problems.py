"""Everything that is wrong with a corpus in one message, so that it can be repaired in one go."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from stablelm.errors import ConfigError, DataError

SHOWN = 8


class Problems:
    """Sentences, each with its key and its fix."""

    def __init__(self) -> None:
        self._sentences: list[str] = []

    @contextlib.contextmanager
    def collecting(self, key: str = "") -> Iterator[None]:
        """Takes in a ConfigError of the block, and a DataError under `key`, and goes on behind the block."""
        try:
            yield
        except ConfigError as error:
            self._sentences.append(str(error))
        except DataError as error:
            if not key:
                raise
            self._sentences.append(f"{key}: {error}")

    def raise_any(self) -> None:
        """Raises ConfigError with a line for each problem, of many the first few and how many there are."""
        if self._sentences:
            rest = len(self._sentences) - SHOWN
            more = [f"and {rest} more problems of this kind"] if rest > 0 else []
            raise ConfigError("\n".join([*self._sentences[:SHOWN], *more]))


def listed(items: Sequence[str], *, show: Callable[[str], str] = repr) -> str:
    """The items in a row, of many the first few and how many there are."""
    rest = len(items) - SHOWN
    return ", ".join(map(show, items[:SHOWN])) + (f" and {rest} more" if rest > 0 else "")
