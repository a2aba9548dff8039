"""Bytes that went to and from a GPU's memory, beside those that the plans count.

    make gpu-profile                      both of these
    ncu OPTIONS python -m bench.traffic   runs a forward and a backward of every case
    python -m bench.traffic build/ncu.csv prints the table of what ncu wrote

What the cache holds of an output when its kernel ends is not counted by ncu: up to its size a kernel may move less.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from bench.gpu import DEVICE, Case, limits_of, plan_of
from bench.peers import OURS, PEERS
from bench.problems import LAYOUTS, RESNET, Problem
from bench.report import markdown, place

CASES: list[Case] = list(product(RESNET, LAYOUTS, ("float32", "bfloat16"), ("bn",)))
DIRECTIONS = ("forward", "backward")


def run(cases: Sequence[Case]) -> None:
    """One launch for each case and direction."""
    for case in cases:
        PEERS[OURS](Problem(*case, DEVICE)).call("both")()


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
    """Megabytes of each launch, planned and measured."""
    body = []
    for (case, direction), found in zip(product(cases, DIRECTIONS), measured, strict=True):
        shape, layout, dtype, _ = case
        plan = plan_of(case, direction, limits)
        where = place({"shape": shape, "layout": layout})
        way = f"{plan.strategy}, {plan.team}"
        ratio = f"{found / plan.bytes_moved:.2f}"
        body.append([where, dtype, direction, way, f"{plan.bytes_moved / 1e6:.1f}", f"{found / 1e6:.1f}", ratio])
    return markdown(["", "", "", "plan", "MB planned", "MB moved", "ratio"], body)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, nargs="?", help="what ncu wrote; without it, run what it is to measure")
    options = parser.parse_args(argv)
    if options.report is None:
        run(CASES)
        return 0
    limits = limits_of(torch.cuda.get_device_name())
    if limits is None:
        raise SystemExit(f"no limits are named for {torch.cuda.get_device_name()}")
    print(table(CASES, moved(options.report.read_text()), limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
