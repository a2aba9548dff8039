"""The measurement on a GPU as tables, as a picture, and against what was to be reached.

python -m bench.gpu_report --data build/gpu/*.json            prints tables and targets, draws build/gpu/gpu.png
python -m bench.gpu_report --data build/gpu/*.json --record   writes all of them to bench/results/gpu.json first
python -m bench.gpu_report --page README.md                   puts the table of the record between that file's marks
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench import memory
from bench.measure import COPY, Row
from bench.peers import OURS, PEERS
from bench.record import RESULTS, write
from bench.report import (
    LAYOUT_NAMES,
    PASS_NAMES,
    PATTERN_NAMES,
    Results,
    Target,
    markdown,
    memory_and_training,
    name_shapes,
    place,
    put_into,
)
from bench.workloads import LEAST_MOVES, PASSES, PATTERNS, sizes_of

RECORD = RESULTS / "gpu.json"
MARKS = ("<!-- bench-gpu:begin -->", "<!-- bench-gpu:end -->")
COLORS = {"float32": "#0b6e99", "float16": "#e0a030", "bfloat16": "#7a4f9a"}
# What a pass is judged by, and how that is written.
FIGURES = {
    "forward": ("of_copy", "{:.0%}"),
    "backward": ("of_copy", "{:.0%}"),
    "both": ("over_best", "{:.2f}×"),
    "inference": ("over_best", "{:.2f}×"),
    "frozen": ("of_copy", "{:.0%}"),
}
HEADS = {"of_copy": "of a copy's rate", "over_best": "over the best peer"}
ALONE = {"pattern": "bn"}
ON_CHIP = {**ALONE, "on_chip": True}
BOTH = {**ALONE, "pass": "both"}
TARGETS = (
    Target("forward, of a copy's rate, mean of what fits on chip", 0.85, {"pass": "forward", **ON_CHIP}, "of_copy"),
    Target("backward, of a copy's rate, mean of what fits on chip", 0.85, {"pass": "backward", **ON_CHIP}, "of_copy"),
    Target("forward + backward over the best peer, mean", 1.5, BOTH, "over_best"),
    Target("forward + backward over the best peer, the slowest", 1.0, BOTH, "over_best", mean=False),
)


def _heads(results: Results) -> dict[str, str]:
    passes = [name for name in FIGURES if name in results.values("pass")]
    return {name: f"{PASS_NAMES.get(name, name)}, {HEADS[FIGURES[name][0]]}" for name in passes}


def _cell(results: Results, name: str, where: dict[str, Any]) -> str:
    """The figures of all dtypes, in brackets for an input that does not fit on chip."""
    field, written = FIGURES[name]
    cells = []
    for dtype in results.values("dtype"):
        (row,) = results.select(peer=OURS, dtype=dtype, **{"pass": name}, **where) or [{}]
        figure = written.format(row[field]) if field in row else row.get("status", "–")
        cells.append(figure if row.get("on_chip", True) or name in ("inference", "frozen") else f"({figure})")
    return " / ".join(cells)


def cases_table(results: Results) -> str:
    """One line a shape and layout, all dtypes in one cell; then the means, those of the other patterns too."""
    heads = _heads(results)
    body = []
    for shape, layout in dict.fromkeys((row["shape"], row["layout"]) for row in results.select(**ALONE)):
        where = {**ALONE, "shape": shape, "layout": layout}
        body.append([place(where), *(_cell(results, name, where) for name in heads)])
    for pattern in (b for b in PATTERNS if b in results.values("pattern")):
        means = [f"geometric mean, {PATTERN_NAMES[pattern]}"]
        for name in heads:
            field, written = FIGURES[name]
            rows = results.select(peer=OURS, pattern=pattern, **{"pass": name})
            found = [[r[field] for r in rows if r["dtype"] == d and field in r] for d in results.values("dtype")]
            means.append(" / ".join(written.format(geometric_mean(figures)) if figures else "–" for figures in found))
        body.append(means)
    return markdown(["", *heads.values()], body)


def rates_table(results: Results) -> str:
    """A line for each pass that was measured: how fast, how near to the bound, how it was laid out."""
    others = [peer for peer in PEERS if peer != OURS and results.select(peer=peer, **{"pass": PASSES})]
    body = []
    for row in results.select(peer=OURS):
        if "bytes_per_second" not in row:
            continue
        case = {name: row[name] for name in ("pattern", "shape", "layout", "dtype", "pass")}
        over = [results.select(**case, peer=peer) for peer in others]
        pattern = [] if row["pattern"] == "bn" else [row["pattern"]]
        body.append(
            [
                ", ".join([*pattern, place(row), row["dtype"], row["pass"]]),
                f"{row['bytes_per_second'] / 1e9:.0f}{'*' if row.get('late') else ''}",
                f"{row['of_copy']:.0%}",
                f"{row['over_bound_us']:.1f}",
                *(f"{found[0]['over_ours']:.2f}×" if found and "over_ours" in found[0] else "–" for found in over),
                row["plan"],
            ]
        )
    overs = (f"over {peer}" for peer in others)
    heads = ["", "GB/s (*: some samples late)", "of a copy", "µs over the bound", *overs, "plan"]
    return markdown(heads, body)


def copy_rate(results: Results) -> float:
    """Bytes a second that the fastest plain copy moves, read and written."""
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    rates = [0.0]
    for row in results.select(peer=COPY):
        values = 1
        for size in sizes_of(row["shape"]):
            values *= size
        rates.append(2 * values * sizes[row["dtype"]] / row["median_ms"] * 1e3)
    return max(rates)


def table(results: Results) -> str:
    """Gives what the README says."""
    machine, versions = results.machine, results.versions
    known = Results({**vars(results), "rows": [r for r in results.rows if r["pass"] != memory.PASS or "kept" in r]})
    least = ", ".join(f"{PASS_NAMES.get(name, name)} {LEAST_MOVES['bn'][name]}" for name in ("forward", "backward"))
    return f"""\
{" / ".join(results.values("dtype"))}; in brackets what does not fit on chip. The rate is that of the least bytes \
(in tensors: {least}) against a plain copy of the same tensors.

{cases_table(results)}

{memory_and_training(known)}\
{machine["gpu"]}, the fastest copy at {copy_rate(results) / 1e12:.2f} TB/s; driver {machine["driver"]}, CUDA \
{machine["cuda"]}, torch {versions["torch"]}, bn_ext {versions["bn_ext"]}; {versions["date"]}.
"""


def _panel(axis: Any, results: Results, shapes: list[str], name: str, layout: str) -> None:
    """The bars of one pass and layout, a group for each shape, and the line to reach."""
    field, _ = FIGURES[name]
    dtypes = results.values("dtype")
    width = 0.8 / len(dtypes)
    for number, dtype in enumerate(dtypes):
        rows = results.select(**ALONE, peer=OURS, dtype=dtype, layout=layout, **{"pass": name})
        found = [row for row in rows if field in row]
        middles = [shapes.index(row["shape"]) + (number + 0.5) * width - 0.4 for row in found]
        bars = axis.bar(middles, [row[field] for row in found], 0.94 * width, color=COLORS[dtype])
        for bar, row in zip(bars, found, strict=True):
            bar.set_alpha(1 if row["on_chip"] else 0.45)
    for target in TARGETS:
        if target.where["pass"] == name:
            axis.axhline(target.bound, color="black", linewidth=0.8, linestyle="-" if target.mean else ":")
    axis.margins(x=0.01)
    name_shapes(axis, shapes, rotation=25)


def picture(results: Results, path: Path) -> None:
    """One panel a pass and layout: the fraction of a copy's rate, and the speed-up over the best peer."""
    heads = {name: head for name, head in _heads(results).items() if name != "inference"}
    layouts, shapes = (list(dict.fromkeys(r[name] for r in results.select(**ALONE))) for name in ("layout", "shape"))
    if not heads or not layouts:
        print("left out: the picture: nothing was measured of batch norm alone")
        return
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        print(f"left out: the picture: {error}")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (1.5 + 6.5 * len(layouts), 1.2 + 2.3 * len(heads))
    figure, axes = plt.subplots(
        len(heads), len(layouts), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for across, (name, head) in zip(axes, heads.items(), strict=True):
        for axis, layout in zip(across, layouts, strict=True):
            _panel(axis, results, shapes, name, layout)
        across[0].set_ylabel(head.replace(", ", "\n"), fontsize=9)
    for axis, layout in zip(axes[0], layouts, strict=True):
        axis.set_title(LAYOUT_NAMES[layout], fontsize=10)
    figure.align_ylabels()
    dtypes = results.values("dtype")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[dtype]) for dtype in dtypes]
    figure.legend(handles, dtypes, loc="outside upper right", ncols=len(handles), frameon=False)
    figure.suptitle(f"{results.machine['gpu']}; pale: does not fit on chip", x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """The data of all files. Of a case that is in several, the data with the most peers."""
    data: dict[str, Any] = {}
    cases: dict[tuple[str, ...], list[Row]] = {}
    for file in files:
        read = json.loads(file.read_text())
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in read.pop("rows"):
            key = tuple(row[name] for name in ("pattern", "shape", "layout", "dtype", "pass"))
            found.setdefault(key, []).append(row)
        cases |= {key: rows for key, rows in found.items() if len(rows) >= len(cases.get(key, []))}
        data = data or read
    return {**data, "rows": [row for rows in cases.values() for row in rows]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", default=[RECORD], help="what python -m bench.gpu wrote")
    parser.add_argument("--record", action="store_true", help="put all of it into bench/results")
    parser.add_argument("--page", type=Path, help=f"a file with {' and '.join(MARKS)}")
    options = parser.parse_args(argv)
    data = merged(options.data)
    results = Results(data)
    if options.record:
        write(RECORD, data)
    if options.page:
        put_into(options.page, table(results), MARKS)
    else:
        print(table(results))
        print("\n".join(target.judge(results)[1] for target in TARGETS))
        print(f"\n{rates_table(results)}")
    picture(results, (RECORD if options.record else options.data[0]).with_name("gpu.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
