"""A page says what to expect of each pattern and of whole networks, as users run and with the heap kept.

python -m bench.expect                    prints the table, draws bench/results/expect.png
python -m bench.expect --page README.md   puts the table between the two marks of that file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from bench import record, training
from bench.cpu import AS_USERS_RUN, RECORD
from bench.measure import Row
from bench.peers import BASELINE, OURS
from bench.report import COLORS, LAYOUT_NAMES, PATTERN_NAMES, Results, markdown, place, put_into
from bench.workloads import LAYOUTS, PATTERNS, RESNET

MARKS = ("<!-- expect:begin -->", "<!-- expect:end -->")
PICTURE = record.RESULTS / "expect.png"
DTYPE, THREADS, PASS = "float32", 2, "both"
_FIGURES = ("speedup", "bound", "kept_over", "peak_over")


@dataclass(frozen=True)
class Expected:
    """Speed-ups of one line of the table; those of a pattern are over its shapes, a network has one."""

    name: str
    rows: Sequence[Row]

    @property
    def middle(self) -> float:
        return geometric_mean(row["speedup"] for row in self.rows)

    @property
    def range(self) -> tuple[float, float]:
        values = [row["speedup"] for row in self.rows]
        return min(values), max(values)

    def cell(self) -> str:
        low, high = self.range
        return f"{self.middle:.2f}×" + (f" ({low:.2f} to {high:.2f})" if len(self.rows) > 1 else "")

    def bound(self) -> str:
        """The largest speed-up that is possible, of a network."""
        return f"{self.rows[0]['bound']:.2f}×" if "bound" in self.rows[0] else ""

    def memory(self) -> str:
        """The memory kept between forward and backward, and the peak of a step, as parts of torch's."""
        row = self.rows[0]
        return f"{row['kept_over']:.0%}, {row['peak_over']:.0%}" if "kept_over" in row else ""


def expected(results: Results) -> list[Expected]:
    """The lines of one record."""
    lines = []
    for pattern in PATTERNS:
        for layout in LAYOUTS:
            where = {"pattern": pattern, "layout": layout, "dtype": DTYPE, "threads": THREADS, "shape": RESNET}
            rows = results.select(peer=OURS, status="ok", **where, **{"pass": PASS})
            lines.append(Expected(f"{PATTERN_NAMES[pattern]}, {LAYOUT_NAMES[layout]}", rows))
    networks = results.select(peer=OURS, status="ok", dtype=DTYPE, **{"pass": training.PASS})
    lines += [Expected(f"{row['pattern']}, {place(row)}", [row]) for row in networks]
    return [line for line in lines if line.rows]


def medians(processes: Sequence[Results]) -> Results:
    """The medians over several processes that measured the same."""
    first = processes[0]
    rows = []
    for same in zip(*(results.rows for results in processes), strict=True):
        figures = {name: median(row[name] for row in same) for name in _FIGURES if all(name in row for row in same)}
        rows.append(same[0] | figures)
    return Results({"machine": first.machine, "versions": first.versions, "rows": rows})


def table(users: Results, kept: Results, processes: int) -> str:
    """Forward and backward of patterns, whole training steps of networks."""
    with_kept = {line.name: line for line in expected(kept)}
    body = []
    for line in expected(users):
        other = with_kept.get(line.name)
        body.append([line.name, line.cell(), other.cell() if other else "–", line.bound(), line.memory()])
    machine, versions = users.machine, users.versions
    head = ["", "as users run", "heap kept", "at most", "memory kept, peak"]
    return f"""\
{markdown(head, body)}

Forward and backward of a layer, over the shapes of ResNet-50 (mean and range), and whole training steps: times as fast
as {BASELINE}, {DTYPE}, {THREADS} threads. *As users run* is with malloc's default settings, medians of {processes}
processes; *heap kept* with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_={64 << 30}`, one process. *At most* is what a
batch norm without any cost would give. *Memory* is in percent of torch's, between forward and backward and at the peak
of a step. {machine["cpu"]}, {machine["cores"]} cores, {machine["isa"]}; torch {versions["torch"]}, bn_ext
{versions["bn_ext"]}; {versions["date"]}.
"""


def picture(users: Results, kept: Results, path: Path) -> None:
    """A dot with its range for each line: in our color as users run, in grey with the heap kept."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    records = (("heap kept", "#b8b8b8", kept, 0.16), ("as users run", COLORS[OURS], users, -0.16))
    names = [line.name for line in expected(users)]
    figure = Figure(figsize=(9, 0.8 + 0.42 * len(names)), layout="constrained")
    axis = figure.subplots()
    for _, color, results, offset in records:
        for line in expected(results):
            if line.name in names:
                height = names.index(line.name) + offset
                axis.plot(line.range, (height, height), color=color, linewidth=3, solid_capstyle="round")
                axis.plot([line.middle], [height], "o", color=color, markersize=8)
                if results is users:
                    end = (line.range[1], height)
                    axis.annotate(f"{line.middle:.2f}×", end, xytext=(7, -3), textcoords="offset points")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks((1, 1.2, 1.5, 2, 2.5, 3))
    axis.minorticks_off()
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    handles = [Line2D([], [], color=color, marker="o", label=label) for label, color, *_ in reversed(records)]
    axis.legend(handles=handles, loc="lower right", frameon=False)
    title = f"Training, times as fast as torch's own ({DTYPE}, {THREADS} threads): layers over their shapes, networks"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.expect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    processes = sorted(AS_USERS_RUN.parent.glob(AS_USERS_RUN.name.replace("1", "*")))
    parser.add_argument(
        "--users",
        type=Path,
        nargs="+",
        default=processes,
        help="what processes of python -m bench --heap default wrote",
    )
    parser.add_argument("--kept", type=Path, default=RECORD, help="what python -m bench wrote")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--page", type=Path, help="a file with the two marks")
    options = parser.parse_args(argv)
    if not options.users:
        parser.error(f"there is no {AS_USERS_RUN}: python -m bench --heap default writes it")
    users = medians([Results(json.loads(path.read_text())) for path in options.users])
    kept = Results(json.loads(options.kept.read_text()))
    text = table(users, kept, len(options.users))
    picture(users, kept, options.picture)
    if options.page:
        put_into(options.page, text, MARKS)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
