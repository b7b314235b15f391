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


def number(value: float) -> str:
    """Three digits or more, without decimals from 1,000 on."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def duration(hours: float) -> str:
    """Hours, from four days on with the days beside them, below an hour minutes or seconds."""
    if hours < 1 / 60:
        return f"{number(3600 * hours)} seconds"
    if hours < 1:
        return f"{number(60 * hours)} minutes"
    return f"{number(hours)} hours" + (f" ({hours / 24:,.1f} days)" if hours >= 96 else "")


def money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.01 else "less than $0.01"


def folded(line: str, indent: int) -> list[str]:
    """The line, where it is longer than 80 columns in several, indented from the second on."""
    return textwrap.wrap(
        line, COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    ) or [""]  # fmt: skip
