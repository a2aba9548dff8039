"""The recorded measurement as a table, as a picture, and beside its targets.

python -m bench.report                           prints the table, draws bench/results/cpu.png
python -m bench.report --page bench/RESULTS.md   puts the table between the two bench marks of that file
python -m bench.report --check                   prints each target with the measured value
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from bench import memory, training
from bench.cpu import RECORD
from bench.measure import COPY, Row
from bench.peers import BASELINE, OURS
from bench.workloads import PASSES, PATTERNS, RESNET

MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")
LAYOUT_NAMES = {"contiguous": "NCHW", "channels_last": "NHWC"}
PATTERN_NAMES = {"bn": "batch norm", "bn+relu": "batch norm + ReLU", "bn+add+relu": "batch norm + add + ReLU"}
PASS_NAMES = {"both": "forward + backward", "frozen": "backward, frozen"}
TRAINING = ("forward", "backward", "both")
JUDGED = ("both", "inference")  # of a pattern with more in it than batch norm
COLORS = {OURS: "#0b6e99", "oneDNN": "#b8b8b8", "Inductor": "#e0a030"}


class Results:
    """The rows of a data file."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.machine, self.versions = data["machine"], data["versions"]
        self.rows: list[Row] = data["rows"]

    def values(self, name: str) -> list[Any]:
        """The different values of a field, in the order of the file."""
        return list(dict.fromkeys(row[name] for row in self.rows if name in row))

    def select(self, **wanted: Any) -> list[Row]:
        """The rows whose fields have these values, or one of them."""

        def fits(row: Row) -> bool:
            return all(row.get(k) in v if isinstance(v, (list, tuple)) else row.get(k) == v for k, v in wanted.items())

        return [row for row in self.rows if fits(row)]

    def speedups(self, **wanted: Any) -> list[float]:
        return [row["speedup"] for row in self.select(**wanted) if "speedup" in row]


def place(row: Row) -> str:
    """Shape and layout, in the words of readers."""
    return f"{row['shape'].replace('x', '×')} {LAYOUT_NAMES[row['layout']] if row['shape'].count('x') == 3 else 'NC'}"


def _mean(rows: list[Row]) -> str:
    """The geometric mean of what could run; a peer with wrong results has none."""
    if any(row["status"] == "wrong" for row in rows):
        return "wrong"
    values = [row["speedup"] for row in rows if "speedup" in row]
    return f"{geometric_mean(values):.2f}×" if values else "–"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(rows: list[Row]) -> str:
    (row,) = rows or [{}]
    if "speedup" not in row:
        return row.get("status", "–")
    return f"{row['speedup']:.2f}× ({100 * row['of_copy']:.0f} %)"


def _heads(passes: Iterable[str]) -> list[str]:
    return [PASS_NAMES.get(name, name) for name in passes]


def _best_other(results: Results, **case: Any) -> str:
    """The fastest of the other peers on forward and backward together."""
    rows = [r for r in results.select(**case, **{"pass": "both"}) if r["peer"] not in (OURS, BASELINE, COPY)]
    best = max((r for r in rows if "speedup" in r), key=lambda r: r["speedup"], default=None)
    return f"{best['peer']} {best['speedup']:.2f}×" if best else "–"


def _over_both(rows: list[Row]) -> str:
    """The means over the baseline and, in brackets, over the best peer of each case."""
    if not rows or any("over_best" not in row for row in rows):
        return ", ".join({row["status"] for row in rows} - {"ok"}) or "–"
    return "{:.2f}× ({:.2f}×)".format(*(geometric_mean(r[name] for r in rows) for name in ("speedup", "over_best")))


def shapes_table(results: Results, dtype: str, threads: int) -> str:
    """One line a shape and layout: speed-up over the baseline, and in brackets the fraction of a copy's rate."""
    case = {"pattern": "bn", "dtype": dtype, "threads": threads}
    passes = [name for name in PASSES if name in results.values("pass")]
    body = []
    for shape in results.values("shape"):
        for layout in dict.fromkeys(row["layout"] for row in results.select(shape=shape, **case)):
            here = {"shape": shape, "layout": layout, **case}
            cells = [_cell(results.select(**here, peer=OURS, **{"pass": name})) for name in passes]
            body.append([place(here), *cells, _best_other(results, **here)])
    return markdown(["", *_heads(passes), "best other, forward + backward"], body)


def means_table(results: Results) -> str:
    """Geometric means over ResNet-50's shapes and both layouts, for each dtype, number of threads and peer."""
    passes = [name for name in PASSES if name in results.values("pass")]
    peers = list(dict.fromkeys(r["peer"] for r in results.select(pattern="bn") if r["peer"] not in (BASELINE, COPY)))
    body = []
    for dtype in results.values("dtype"):
        for threads in results.values("threads"):
            for peer in peers:
                where = {"pattern": "bn", "dtype": dtype, "threads": threads, "peer": peer, "shape": RESNET}
                cells = [_mean(results.select(**where, **{"pass": name})) for name in passes]
                body.append([f"{dtype}, {_threads(threads)}", peer, *cells])
    return markdown(["", "", *_heads(passes)], body)


def patterns_table(results: Results, dtype: str, threads: int) -> str:
    """Gives a table of the patterns with an epilogue: by shape and layout, then the means, over baseline and peers."""
    heads = {(b, name): f"{PATTERN_NAMES[b]}, {PASS_NAMES.get(name, name)}" for b in PATTERNS[1:] for name in JUDGED}
    rows = results.select(peer=OURS, pattern=PATTERNS[1:], **{"pass": JUDGED})

    def line(name: str, **where: Any) -> list[str]:
        return [name, *(_over_both(results.select(peer=OURS, pattern=b, **{"pass": p}, **where)) for b, p in heads)]

    shown = {"dtype": dtype, "threads": threads}
    places = {place(r): {k: r[k] for k in ("shape", "layout")} for r in rows if shown.items() <= r.items()}
    kinds = dict.fromkeys((r["dtype"], r["threads"]) for r in rows)
    return markdown(
        ["", *heads.values()],
        [
            *(line(name, **where, **shown) for name, where in places.items()),
            *(line(f"geometric mean, {d}, {_threads(t)}", dtype=d, threads=t) for d, t in kinds),
        ],
    )


def memory_line(results: Results) -> str:
    """Gives a table of what a training step of the pattern keeps and takes at its peak, ours against the baseline's."""
    rows = results.select(peer=OURS, pattern=PATTERNS[-1], **{"pass": memory.PASS})
    found = (
        f"{LAYOUT_NAMES[r['layout']]} {r['dtype']} {r['kept_over']:.0%} (at the peak {r['peak_over']:.0%})"
        for r in rows
    )
    return f"{PATTERN_NAMES[PATTERNS[-1]]} keeps for backward, of what {BASELINE} keeps: {', '.join(found)}."


def training_table(results: Results) -> str:
    """Images a second, and in brackets over the same without bn_ext."""
    rows = results.select(**{"pass": training.PASS})
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        over = f" ({row['over_plain']:.2f}×)" if "over_plain" in row else ""
        figure = f"{row['images_a_second']:.0f}{over}" if row["status"] == "ok" else row["status"]
        name = f"{row['pattern']}, {row['shape'].replace('x', '×')} {LAYOUT_NAMES[row['layout']]}, {row['dtype']}"
        lines.setdefault(name, {})[row["peer"]] = figure
    return markdown(["", *peers], [[name, *(cells.get(p, "–") for p in peers)] for name, cells in lines.items()])


def memory_and_training(results: Results) -> str:
    """The lines about memory and training, if they were measured."""
    parts = []
    if results.select(**{"pass": memory.PASS}):
        parts.append(memory_line(results))
    if results.select(**{"pass": training.PASS}):
        parts.append("Whole training steps, in images a second; in brackets over the same without bn_ext.")
        parts.append(training_table(results))
    return "".join(f"{part}\n\n" for part in parts)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def headline(results: Results) -> dict[str, Any]:
    """The dtype and number of threads that table and picture show in full."""
    dtypes = results.values("dtype")
    return {
        "dtype": "float32" if "float32" in dtypes else dtypes[0],
        "threads": max(results.values("threads"), default=1),
    }


def table(results: Results) -> str:
    """The text of bench/RESULTS.md."""
    machine, versions = results.machine, results.versions
    shown = headline(results)
    return f"""\
Times faster than {BASELINE} ({shown["dtype"]}, {_threads(shown["threads"])}); in brackets the rate at which the least \
bytes move, in percent of a plain copy's.

{shapes_table(results, **shown)}

Geometric means over the shapes of ResNet-50 in both layouts (oneDNN: NCHW alone, it has no other):

{means_table(results)}

With what follows it in the same call: over {BASELINE}, in brackets over the best of all others.

{patterns_table(results, **shown)}

{memory_and_training(results)}\
{machine["cpu"]}, {machine["cores"]} cores, {machine["isa"]}; torch {versions["torch"]}, bn_ext {versions["bn_ext"]}, \
{versions["compiler"]}; {versions["date"]}.
"""


def put_into(page: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replaces what stands between the marks."""
    before, begin, rest = page.read_text().partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not (begin and end):
        raise SystemExit(f"{page} has no {' and '.join(marks)}")
    page.write_text(f"{before}{begin}\n{text}{end}{after}")


@dataclass(frozen=True)
class Target:
    """A figure to reach, over all rows that ``where`` selects."""

    name: str
    bound: float
    where: dict[str, Any]
    figure: str = "speedup"
    mean: bool = True  # else the worst single one counts
    at_most: bool = False  # or else at least

    def judge(self, results: Results) -> tuple[bool, str]:
        """Whether it is reached, and a line that says so."""
        rows = results.select(peer=OURS, **self.where)
        if not rows:
            return False, f"?      {self.name}: not measured"
        refused = [row for row in rows if self.figure not in row]
        if refused:
            return False, f"short  {self.name}: {place(refused[0])} is {refused[0]['status']}"
        worst = (max if self.at_most else min)(rows, key=lambda row: row[self.figure])
        value = geometric_mean(row[self.figure] for row in rows) if self.mean else worst[self.figure]
        reached = value <= self.bound if self.at_most else value >= self.bound
        under = _threads(worst["threads"]) if "threads" in worst else worst["dtype"]
        case = "" if self.mean else " at {}, {pass}, {}".format(place(worst), under, **worst)
        return reached, f"{'ok   ' if reached else 'short'}  {self.name}: {value:.3f}, to reach {self.bound}{case}"


def _resnet(dtype: str, name: str, pattern: str = "bn") -> dict[str, Any]:
    return {"pattern": pattern, "dtype": dtype, "threads": 2, "shape": RESNET, "pass": name}


ADD_RELU = {name: _resnet("float32", name, "bn+add+relu") for name in JUDGED}
ALONE = {"pattern": "bn", "dtype": "float32"}


TARGETS = (
    Target("float32 forward, mean over ResNet's shapes, 2 threads", 2.5, _resnet("float32", "forward")),
    Target("float32 backward, mean over ResNet's shapes, 2 threads", 1.4, _resnet("float32", "backward")),
    Target("float32 both, mean over ResNet's shapes, 2 threads", 1.8, _resnet("float32", "both")),
    Target("float32 training, the slowest single case", 1.0, {**ALONE, "pass": TRAINING}, mean=False),
    Target("float32 inference, the slowest single case", 1.0, {**ALONE, "pass": "inference"}, mean=False),
    Target("float32 module call on 2x32x8x8, the slowest", 1.0, {**ALONE, "shape": "2x32x8x8"}, mean=False),
    Target("bfloat16 both, mean over ResNet's shapes, 2 threads", 2.0, _resnet("bfloat16", "both")),
    Target("float32 frozen backward, of a copy's rate, mean", 0.85, _resnet("float32", "frozen"), "of_copy"),
    Target("add + ReLU float32 both, mean", 2.5, ADD_RELU["both"]),
    Target("add + ReLU float32 both over the best peer, mean", 1.5, ADD_RELU["both"], "over_best"),
    Target("add + ReLU float32 inference, mean", 2.0, ADD_RELU["inference"]),
    Target("add + ReLU float32, the slowest single case", 1.0, {**ADD_RELU["both"], "pass": JUDGED}, mean=False),
    Target(
        "add + ReLU kept for backward",
        0.55,
        {"pattern": PATTERNS[-1], "pass": memory.PASS},
        "kept_over",
        mean=False,
        at_most=True,
    ),
)


def _panel(axis: Any, results: Results, shapes: list[str], **where: Any) -> None:
    """The bars of one pass and layout, a group for each shape; a peer not measured here gets no room."""
    peers = [peer for peer in COLORS if results.speedups(peer=peer, **where)]
    width = 0.8 / max(len(peers), 1)
    for number, peer in enumerate(peers):
        found = {row["shape"]: row["speedup"] for row in results.select(peer=peer, **where) if "speedup" in row}
        middles = [shapes.index(shape) + (number + 0.5) * width - 0.4 for shape in found]
        axis.bar(middles, [value - 1 for value in found.values()], 0.94 * width, bottom=1, color=COLORS[peer])
        if peer == OURS:
            for middle, value in zip(middles, found.values(), strict=True):
                axis.annotate(
                    f"{value:.2g}" if value < 1 else f"{value:.1f}",
                    (middle, max(value, 1)),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log", base=2)  # twice as fast and half as fast are equally far from 1
    axis.yaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.01, y=0.12)
    name_shapes(axis, shapes, rotation=20)


def name_shapes(axis: Any, shapes: list[str], rotation: float) -> None:
    """Below the groups of bars, and nothing around them."""
    axis.set_xticks(range(len(shapes)), [shape.replace("x", "×") for shape in shapes])
    axis.tick_params(axis="x", labelrotation=rotation, labelsize=8, length=0)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def picture(results: Results, path: Path) -> None:
    """Grouped bars: speed-up over the baseline of every peer, one panel a pass and layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = headline(results)
    panels = [*(("bn", name) for name in TRAINING), *((pattern, "both") for pattern in PATTERNS[1:])]
    rows = [(pattern, name) for pattern, name in panels if results.select(pattern=pattern, **{"pass": name})]
    columns = [name for name in LAYOUT_NAMES if results.select(layout=name, pattern=PATTERNS, **shown)]
    shapes = [
        list(dict.fromkeys(r["shape"] for r in results.select(layout=name, pattern=PATTERNS, **shown)))
        for name in columns
    ]
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(1.5 + 5.5 * len(columns), 0.9 + 2.3 * len(rows)),
        squeeze=False,
        sharex="col",
        sharey="row",
        layout="constrained",
        width_ratios=[len(here) for here in shapes],
    )
    for across, (pattern, name) in zip(axes, rows, strict=True):
        for axis, here, layout in zip(across, shapes, columns, strict=True):
            _panel(axis, results, here, pattern=pattern, layout=layout, **{"pass": name}, **shown)
        label = PASS_NAMES.get(name, name)
        across[0].set_ylabel(label if pattern == "bn" else f"{PATTERN_NAMES[pattern]}\n{label}", fontsize=9)
    for axis, layout in zip(axes[0], columns, strict=True):
        axis.set_title(LAYOUT_NAMES[layout], fontsize=10)
    figure.align_ylabels()
    peers = [peer for peer in COLORS if peer in results.values("peer")]
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=COLORS[peer]) for peer in peers]
    handles.append(plt.Line2D([], [], color="black", linewidth=0.8))
    figure.legend(handles, [*peers, f"{BASELINE} = 1"], loc="outside upper right", ncols=len(handles), frameon=False)
    title = f"Times faster than {BASELINE}: {shown['dtype']}, {_threads(shown['threads'])}, {results.machine['cpu']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=RECORD, help="what python -m bench wrote")
    parser.add_argument("--picture", type=Path, help="default: beside the data, as .png")
    parser.add_argument("--page", type=Path, help="a file with the two bench marks")
    parser.add_argument("--check", action="store_true", help="only the targets; fails where one is short")
    options = parser.parse_args(argv)
    results = Results(json.loads(options.data.read_text()))
    if options.check:
        verdicts = [target.judge(results) for target in TARGETS]
        print("\n".join(line for _, line in verdicts))
        return 0 if all(reached for reached, _ in verdicts) else 1
    if results.select(pattern=PATTERNS, **{"pass": TRAINING}):
        picture(results, options.picture or options.data.with_suffix(".png"))
    if options.page:
        put_into(options.page, table(results))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
