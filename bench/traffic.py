"""Bytes that kernels moved to and from a GPU's memory, beside the bytes that the plans count.

    python -m bench.traffic ncu.csv   has ncu measure a forward and a backward of every case; prints the table
    python -m bench.traffic           runs what ncu measures

ncu does not count what is still in the cache when a kernel ends: a kernel may move less by up to the cache's size.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import time

import torch

from bench.gpu import DEVICE
from bench.gpu_plan import Case, in_words, limits_of, plan_of
from bench.peers import OURS, PEERS
from bench.report import markdown, place
from bench.workloads import LAYOUTS, RESNET, Workload

CASES: list[Case] = [(shape, la, dtype, "bn") for dtype, shape, la in product(("bfloat16", "float32"), RESNET, LAYOUTS)]
DIRECTIONS = ("forward", "backward")
# The clocks stay as they are: bytes do not depend on them.
NCU = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--kernel-name", "regex:batch_norm_kernel"]
METRICS = ["--metrics", "dram__bytes_read.sum,dram__bytes_write.sum"]


def run(cases: Sequence[Case], until: float) -> None:
    """One launch for each case and direction, until the time is up: ncu reports on what ends by itself."""
    ran = 0
    for case in cases:
        if time() > until:
            break
        PEERS[OURS](Workload(*case, DEVICE)).call("both")()
        ran += 1
    print(f"{ran} cases ran")


def profile(report: Path, until: float) -> int:
    """Runs the cases under ncu, and says how many ran."""
    inner = [sys.executable, "-m", "bench.traffic", "--until", str(until)]
    command = [*NCU, *METRICS, "--log-file", str(report), *inner]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout
    print(said, end="", flush=True)
    ran = re.search(r"^(\d+) cases ran$", said, re.MULTILINE)
    return int(ran[1]) if ran else 0


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
    """Megabytes of each launch, planned and moved."""
    launches = list(product(cases, DIRECTIONS))
    if len(measured) != len(launches):  # nobody knows which is which
        raise SystemExit(f"{len(cases)} cases ran, so there should be {len(launches)} launches, got {len(measured)}")
    body = []
    for (case, direction), found in zip(launches, measured, strict=True):
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
    parser.add_argument("report", type=Path, nargs="?", help="where ncu writes; without it, run what it is to measure")
    parser.add_argument("--within", type=float, default=math.inf, help="seconds, after which no other case begins")
    parser.add_argument("--until", type=float, default=math.inf, help="the same as a time, in seconds since the epoch")
    options = parser.parse_args(argv)
    until = min(options.until, time() + options.within)
    if options.report is None:
        run(CASES, until)
        return 0
    if shutil.which(NCU[0]) is None:
        print("left out: bytes that memory moved: there is no ncu")
        return 0
    limits = limits_of(torch.cuda.get_device_name())
    if limits is None:
        raise SystemExit(f"no limits are named for {torch.cuda.get_device_name()}")
    ran = profile(options.report, until)
    print(table(CASES[:ran], moved(options.report.read_text()), limits))
    if missing := len(CASES) - ran:
        print(f"left out: {missing} of {len(CASES)} cases: the time was up")
    return 0


if __name__ == "__main__":
    sys.exit(main())
