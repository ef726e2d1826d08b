"""HTML as tests read it: elements with their text, rows of tables, and a page's script data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "input", "br"}


@dataclass
class Element:
    """An element of a page."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def inside(self) -> Iterator[Element]:
        """All elements inside, in the page's order."""
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child.inside()

    def all(self, tag: str, class_: str | None = None, **attributes: str) -> Iterator[Element]:
        """Elements inside with this tag, with this class among theirs, and with these attributes."""
        for child in self.inside():
            fits = all(child.attributes.get(name) == value for name, value in attributes.items())
            if child.tag == tag and fits and class_ in (None, *child.attributes.get("class", "").split()):
                yield child

    def one(self, tag: str, class_: str | None = None, **attributes: str) -> Element:
        """The only one of `all`."""
        (found,) = self.all(tag, class_, **attributes)
        return found

    @property
    def text(self) -> str:
        """All text inside, blanks put together."""
        return " ".join(self.raw.split())

    @property
    def raw(self) -> str:
        """All text inside as it is."""
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    def rows(self) -> list[list[str]]:
        """A table's rows as texts, the head first."""
        return [[cell.text for cell in row.children if isinstance(cell, Element)] for row in self.all("tr")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def read_page(page: str) -> Element:
    """A page as its elements; every one must be closed in its place."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert len(reader._open) == 1, [element.tag for element in reader._open]
    return reader.root


def script_data(page: Element) -> dict[str, Any]:
    """What a page's own script reads."""
    return json.loads(page.one("script", id="curve").raw)
