"""An HTML page taken apart, strictly: what is not closed, or closed twice, is an error."""

from html.parser import HTMLParser
from typing import ClassVar


class PageText(HTMLParser):
    """`text`: what a reader sees, without the style; `tags`: name and attributes of every element in order."""

    VOID: ClassVar = {"meta", "link", "br", "img", "line", "rect", "image"}

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.text, self.tags = "", []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == [], self._open
        ids = self.attributes("id")
        assert len(ids) == len(set(ids))
        assert set(" ".join(self.attributes("aria-labelledby")).split()) <= set(ids)

    def attributes(self, name: str) -> list[str]:
        return [given[name] for _, given in self.tags if name in given]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, (tag, self._open, self.getpos())

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += " " + " ".join(data.split())
