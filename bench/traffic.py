"""Bytes that went to and from a GPU's memory, beside those that the plans count.

    python -m bench.traffic ncu.csv --profile   has ncu measure a forward and a backward of every case
    python -m bench.traffic ncu.csv             prints the table of what ncu wrote
    python -m bench.traffic                     runs what ncu measures

The first of these ends with the table too. What the cache holds of an output when its kernel ends is not counted by
ncu: up to its size a kernel may move less.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from bench.gpu import DEVICE
from bench.gpu_plan import Case, in_words, limits_of, plan_of
from bench.peers import OURS, PEERS
from bench.problems import LAYOUTS, RESNET, Problem
from bench.report import markdown, place

CASES: list[Case] = [(shape, la, dtype, "bn") for dtype, shape, la in product(("bfloat16", "float32"), RESNET, LAYOUTS)]
DIRECTIONS = ("forward", "backward")
# The clocks stay as they are: bytes do not depend on them.
NCU = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", "regex:batch_norm_kernel"]
METRICS = ["--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]


def run(cases: Sequence[Case]) -> None:
    """One launch for each case and direction."""
    for case in cases:
        PEERS[OURS](Problem(*case, DEVICE)).call("both")()


def profile(report: Path) -> int:
    """Runs the cases under ncu; when it is interrupted, what it wrote so far is there."""
    command = [*NCU, *METRICS, "--log-file", str(report), sys.executable, "-m", "bench.traffic"]
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 1


def moved(report: str) -> list[int]:
    """The bytes of each launch: ``ncu --csv --print-units base`` writes a line for each metric of each."""
    lines = report.splitlines()
    head = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if head is None:
        raise SystemExit("ncu measured nothing:\n" + "\n".join(lines[-5:]))
    launches: dict[str, int] = {}
    for row in csv.DictReader(lines[head:]):
        launches[row["ID"]] = launches.get(row["ID"], 0) + round(float(row["Metric Value"].replace(",", "")))
    return list(launches.values())


def table(cases: Sequence[Case], measured: Sequence[int], limits: str) -> str:
    """Megabytes of each launch that was measured, planned and moved."""
    body = []
    for (case, direction), found in zip(product(cases, DIRECTIONS), measured, strict=False):
        shape, layout, dtype, _ = case
        plan = plan_of(case, direction, limits)
        where = place({"shape": shape, "layout": layout})
        ratio = f"{found / plan.bytes_moved:.2f}"
        figures = [f"{plan.bytes_moved / 1e6:.1f}", f"{found / 1e6:.1f}", ratio]
        body.append([where, dtype, direction, in_words(plan), *figures])
    return markdown(["", "", "", "plan", "MB planned", "MB moved", "ratio"], body)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, nargs="?", help="what ncu wrote; without it, run what it is to measure")
    parser.add_argument("--profile", action="store_true", help="have ncu write the report first")
    options = parser.parse_args(argv)
    if options.report is None:
        run(CASES)
        return 0
    if options.profile and shutil.which(NCU[0]) is None:
        print("left out: bytes that memory moved: there is no ncu")
        return 0
    status = profile(options.report) if options.profile else 0
    limits = limits_of(torch.cuda.get_device_name())
    if limits is None:
        raise SystemExit(f"no limits are named for {torch.cuda.get_device_name()}")
    measured = moved(options.report.read_text())
    print(table(CASES, measured, limits))
    if missing := len(CASES) * len(DIRECTIONS) - len(measured):
        print(f"left out: {missing} of {len(CASES) * len(DIRECTIONS)} launches: ncu did not get to them")
    return status


if __name__ == "__main__":
    sys.exit(main())
