"""Tables that print in a terminal and show in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, repr=False)
class Table:
    """Rows of text under a head, between lines of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    above: Sequence[str] = ()
    below: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [self.head, *self.rows] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*lines)]
        aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
        return "\n".join((*self.above, *aligned, *self.below))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        def text(lines: Sequence[str]) -> str:
            return "<br>".join(map(escape, lines))

        body = "".join(line(row, "td") for row in self.rows)
        table = f"<table>{line(self.head, 'th')}{body}</table>" if self.rows else ""
        return f"<div>{text(self.above)}{table}{text(self.below)}</div>"
