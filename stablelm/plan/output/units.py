"""Bytes, times and money as people read them, and lines of 80 columns."""

import textwrap

COLUMNS = 80


def size(size: float) -> str:
    """Bytes in decimal units, as data sheets have them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


def seconds(seconds: float) -> str:
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def duration(hours: float) -> str:
    """Hours, from four days on with the days beside them, below an hour in minutes."""
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:,.1f} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 96 else "")


def money(dollars: float) -> str:
    return f"${dollars:,.2f}"


def folded(line: str, indent: int) -> list[str]:
    """The line, where it is longer than 80 columns in several, indented from the second on."""
    return textwrap.wrap(
        line, COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    ) or [""]  # fmt: skip
