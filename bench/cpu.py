"""The measurement on the CPU: which cases, on what machine, into which file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.measure import FIELDS, Row, build, measure
from bench.peers import BASELINE, OURS, PEERS
from bench.problems import DTYPES, LAYOUTS, PASSES, RESNET, SHAPES, Problem, layouts

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "results" / "cpu.json"
PARTIAL = ROOT / "build" / "bench.json"  # part of the grid does not replace the record

GRID: dict[str, Any] = {
    "shapes": SHAPES,
    "layouts": tuple(LAYOUTS),
    "dtypes": tuple(DTYPES),
    "threads": (1, 2),
    "passes": PASSES,
    "peers": tuple(name for name in PEERS if name not in (OURS, BASELINE)),
}
QUICK: dict[str, Any] = {"shapes": RESNET, "dtypes": ("float32",), "threads": (2,), "peers": (), "seconds": 1.0}
BUSY = 0.5  # load a core above which figures are not worth keeping


def machine() -> dict[str, Any]:
    """The processor, in what matters for speed and names nobody."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        caches[f"L{level} {kind.lower()}"] = size
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "caches": caches,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """What was measured with what; a commit with uncommitted changes to the code is marked as dirty."""
    sources = ("bn_ext", "csrc", "setup.py", "bench", ":!bench/results")
    dirty = "-dirty" if _output("git", "status", "--porcelain", "--", *sources) else ""
    commit = _output("git", "rev-parse", "--short", "HEAD")
    return {
        "bn_ext": f"{commit}{dirty}" if commit else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": (_output(os.environ.get("CXX", "c++"), "--version").splitlines() or ["unknown"])[0],
        "date": date.today().isoformat(),
    }


def run(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one case after the other."""
    grid = (
        (shape, layout, dtype)
        for dtype in options.dtypes
        for shape in options.shapes
        for layout in layouts(shape)
        if layout in options.layouts
    )
    for shape, layout, dtype in grid:
        problem = Problem(shape, layout, dtype)
        for threads in options.threads:
            torch.set_num_threads(threads)
            peers = build(problem, options.peers)
            case = {"shape": shape, "layout": layout, "dtype": dtype, "threads": threads}
            for name in options.passes:
                rows = measure(problem, peers, name, options.seconds, options.rounds)
                yield [case | row for row in rows]


def _line(rows: list[Row]) -> str:
    """One case for whoever watches."""
    case = "{shape} {layout} {dtype} {threads} {pass}".format(**rows[0])
    figures = (
        f"{row['peer']} {row['median_ms']:.3g} ms" + (f" ({row['speedup']:.2f}x)" if "speedup" in row else "")
        if row["status"] == "ok"
        else f"{row['peer']} {row['status']}"
        for row in rows
    )
    return f"{case}: {', '.join(figures)}"


def write(path: Path, data: dict[str, Any]) -> None:
    """JSON with one row a line, four digits a figure."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    rows = ",\n".join(json.dumps({k: short(v) for k, v in row.items()}) for row in data["rows"])
    head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="float32, 2 threads, ResNet-50's shapes, no other peers")
    parser.add_argument("--shapes", nargs="+", metavar="NxCxHxW")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--threads", nargs="+", type=int, metavar="N")
    parser.add_argument("--passes", nargs="+", choices=PASSES)
    parser.add_argument("--peers", nargs="*", choices=GRID["peers"], help=f"beside {OURS} and {BASELINE}")
    parser.add_argument("--seconds", type=float, help="time for each case, at the least")
    parser.add_argument("--rounds", type=int, default=7, help="samples for each case, at the least")
    parser.add_argument("--out", type=Path, help="default: bench/results/cpu.json if this is the whole grid")
    options = parser.parse_args(argv)
    defaults = GRID | QUICK if options.quick else GRID | {"seconds": 3.0}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.out is None:
        covered = all(set(getattr(options, name)) >= set(values) for name, values in GRID.items())
        options.out = RECORD if covered else PARTIAL
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    data: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        },
        "fields": FIELDS,
        "rows": [],
    }
    if data["machine"]["load_before"] > BUSY * (os.cpu_count() or 1):
        print("this machine is busy: expect noise", file=sys.stderr)
    for rows in run(options):
        print(_line(rows), flush=True)
        data["rows"] += rows
    write(options.out, data)
    print(f"wrote {options.out}")
    refused = [row for row in data["rows"] if row["peer"] == OURS and row["status"] != "ok"]
    for row in refused:
        print("refused: {shape} {layout} {dtype} {threads} {pass}: {reason}".format(**row), file=sys.stderr)
    return 1 if refused else 0
