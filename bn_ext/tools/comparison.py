"""A model run in several ways: what was found out, as data and in words."""

from __future__ import annotations

from dataclasses import dataclass, field

from bn_ext._table import Table
from bn_ext.tools.timing import duration

TORCH, CONVERTED, FUSED = "torch", "bn_ext.convert", "bn_ext.fuse"
COMPILED, COMPILED_OURS = "torch.compile", "torch.compile, bn_ext"
WITHOUT = "no batch norm"


@dataclass
class Row:
    """A row holds the findings about one way to run the model. Times are in seconds, memory is in bytes."""

    name: str
    remark: str = ""
    failure: str = ""  # why there are no figures
    counts: bool = True  # whether a failure is one of the comparison
    error: float | None = None
    kept: int | None = None  # in training
    peak: int | None = None
    seconds: float | None = None
    speedup: tuple[float, float, float] | None = None  # over torch: the 20th, 50th and 80th percentile of the rounds

    def cells(self) -> tuple[str, ...]:
        if self.failure:
            return self.name, "", "", "", "", _relative(self.error), self.failure
        low, middle, high = self.speedup or (1.0, 1.0, 1.0)
        spread = "" if self.name == TORCH else f" ({low:.2f} to {high:.2f})"
        return (
            self.name,
            duration(self.seconds or 0.0),
            f"{middle:.2f}x{spread}",
            _size(self.kept),
            _size(self.peak),
            _relative(self.error),
            self.remark,
        )


def _relative(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@dataclass(repr=False)
class Comparison:
    """A model run in several ways. Prints as a table, in notebooks too.

    ``bound`` is about the speed-up that a batch norm without any cost would give, with the additions and activations
    that ``fuse`` found behind batch norms; None where no batch norm was found.
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    bound: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether one of the ways gave other results or could not run."""
        return any(row.failure and row.counts for row in self.rows)

    def table(self) -> Table:
        head = ("", "time", "speed-up", "kept for backward", "peak", "error", "")
        rows = [row.cells() for row in self.rows]
        used = [i for i, column in enumerate(zip(*rows)) if i == 0 or any(column)]
        below = list(self.notes)
        if self.bound is not None:
            below.insert(0, _in_words(self.bound))
        return Table([head[i] for i in used], [[row[i] for i in used] for row in rows], [self.title], below)

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _in_words(bound: float) -> str:
    share = 1 - 1 / bound
    what = "Batch norm, with the additions and activations behind it, takes"
    if share < 0.005:
        return f"{what} less than 1 % of this model's step."
    most = f"no batch norm can give more than {bound:.2f}x here"
    return f"{what} about {100 * share:.0f} % of this model's step: {most}."
