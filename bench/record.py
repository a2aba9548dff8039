"""All measurements share this: options of the command line, versions, the data file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from bench.measure import Row
from bench.peers import BASELINE, OURS
from bench.workloads import DTYPES, LAYOUTS, PASSES, PATTERNS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SECTIONS = ("patterns", "memory", "training")
PARTIAL = ROOT / "build" / "bench.json"  # part of a grid does not replace the record


def output(*command: str) -> str:
    """The output of a command; empty if it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def versions() -> dict[str, str]:
    """The versions of the software. A commit with uncommitted changes to the code is marked as dirty."""
    sources = ("bn_ext", "csrc", "setup.py", "bench", ":!bench/results", ":!bench/RESULTS.md")
    dirty = "-dirty" if output("git", "status", "--porcelain", "--", *sources) else ""
    commit = output("git", "rev-parse", "--short", "HEAD")
    return {
        "bn_ext": f"{commit}{dirty}" if commit else "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": (output(os.environ.get("CXX", "c++"), "--version").splitlines() or ["unknown"])[0],
        "date": date.today().isoformat(),
    }


WHOLE_GRID = "the record in bench/results if this is the whole grid"


def parser(
    prog: str, doc: str | None, grid: dict[str, Any], rounds: int, out: str = WHOLE_GRID
) -> argparse.ArgumentParser:
    """The options for every device, without defaults; ``out`` is the data file."""
    made = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sections", nargs="+", choices=grid["sections"], help="default: all")
    made.add_argument("--patterns", nargs="+", choices=PATTERNS)
    made.add_argument("--shapes", nargs="+", metavar="NxCxHxW")
    made.add_argument("--layouts", nargs="+", choices=LAYOUTS)
    made.add_argument("--dtypes", nargs="+", choices=DTYPES)
    made.add_argument("--passes", nargs="+", choices=PASSES)
    made.add_argument("--peers", nargs="*", choices=grid["peers"], help=f"beside {OURS} and {BASELINE}")
    made.add_argument("--seconds", type=float, help="time for each case, at the least")
    made.add_argument("--rounds", type=int, default=rounds, help="samples for each case, at the least")
    made.add_argument("--out", type=Path, help=f"default: {out}")
    return made


def settle(
    options: argparse.Namespace, grid: dict[str, Any], defaults: dict[str, Any], record: Path
) -> argparse.Namespace:
    """Fills in defaults, and the data file."""
    options.chosen = {name for name in grid if getattr(options, name) is not None}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.out is None:
        covered = all(set(getattr(options, name)) >= set(values) for name, values in grid.items())
        options.out = record if covered else PARTIAL
    return options


def line(rows: list[Row]) -> str:
    """A line about one case, to be printed as it is measured."""
    case = " ".join(str(value) for _, value in takewhile(lambda field: field[0] != "peer", rows[0].items()))
    return f"{case}: {', '.join(map(_figure, rows))}"


def _figure(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['peer']} {row['status']}"
    if "median_ms" not in row:
        return f"{row['peer']} keeps {row['kept']:.2f}, peak {row['peak']:.2f}"
    return f"{row['peer']} {row['median_ms']:.3g} ms" + (f" ({row['speedup']:.2f}x)" if "speedup" in row else "")


def collect(sections: Iterable[Iterable[list[Row]]], data: dict[str, Any], path: Path) -> int:
    """Adds the rows of all cases to ``data``; each case is printed and written as it comes."""
    data.setdefault("rows", [])
    write(path, data)
    for cases in sections:
        for case in cases:
            data["rows"] += case
            write(path, data)
            if case:
                print(line(case), flush=True)
    print(f"wrote {path}")
    return refused(data["rows"])


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes JSON: one row per line, four digits per figure. If the process is ended meanwhile, the file stays."""

    def short(value: Any) -> Any:
        return float(f"{value:.4g}") if isinstance(value, float) else value

    rows = ",\n".join(json.dumps({k: short(v) for k, v in row.items()}) for row in data["rows"])
    head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')
    unfinished.replace(path)


def rows_of(path: Path) -> list[Row]:
    """The rows in the data file ``path``; none if there is no such file."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def refused(rows: list[Row]) -> int:
    """1 and a line for each, where ours could not be measured."""
    found = [row for row in rows if row["peer"] == OURS and row["status"] != "ok"]
    for row in found:
        print(f"refused: {line([row])}: {row['reason']}", file=sys.stderr)
    return 1 if found else 0
