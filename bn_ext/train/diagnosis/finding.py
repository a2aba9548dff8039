"""Findings, and how a list of them prints."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from typing import NamedTuple

from bn_ext._table import Table

_WIDTH = 110


class Finding(NamedTuple):
    """One thing to look at."""

    path: str  # of the module; empty if it is the model itself
    what: str  # was found
    why: str  # it matters
    remedy: str  # what to do
    source: str  # where it was found out


class Findings(list[Finding]):
    """A list that prints as a table: alike findings in a line, with reasons, remedies and sources below."""

    def table(self) -> Table:
        notes: dict[tuple[str, str, str], int] = {}
        paths: dict[tuple[str, int], list[str]] = defaultdict(list)
        for path, what, *note in self:
            number = notes.setdefault(tuple(note), len(notes) + 1)  # type: ignore[arg-type]
            paths[what, number].append(path or "the model")
        rows = [(_several(each), what, f"[{number}]") for (what, number), each in paths.items()]
        below: list[str] = []
        for (why, remedy, source), number in notes.items():
            text = f"[{number}] {why} {remedy} ({source})"
            below += ["", *textwrap.wrap(text, _WIDTH, subsequent_indent=" " * 4)]
        above = [] if self else ["nothing was found"]
        return Table(("where", "what", "note"), rows, above, below)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _several(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
