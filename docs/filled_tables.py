"""Tables between comments of a Markdown page, which scripts make and nobody edits."""

import re
from collections.abc import Callable, Mapping, Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """`page` with the text between `<!-- NAME -->` and `<!-- end -->` made anew, for each name in `tables`."""

    def replaced(match: re.Match[str]) -> str:
        made = tables.get(match[1])
        return match[0] if made is None else f"<!-- {match[1]} -->\n{made()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n(?:.*\n)*?<!-- end -->", replaced, page)
