"""The measurement on the CPU: which cases, on what machine, into which file."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.measure import FIELDS, Row, build, measure
from bench.peers import OTHERS
from bench.problems import LAYOUTS, PASSES, RESNET, SHAPES, Problem, layouts

RECORD = record.RESULTS / "cpu.json"

GRID: dict[str, Any] = {
    "shapes": SHAPES,
    "layouts": tuple(LAYOUTS),
    "dtypes": ("float32", "bfloat16"),
    "threads": (1, 2),
    "passes": PASSES,
    "peers": OTHERS["cpu"],
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


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = record.parser("python -m bench", __doc__, GRID, rounds=7)
    parser.add_argument("--quick", action="store_true", help="float32, 2 threads, ResNet-50's shapes, no other peers")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N")
    options = parser.parse_args(argv)
    return record.settle(options, GRID, GRID | (QUICK if options.quick else {"seconds": 3.0}), RECORD)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    data: dict[str, Any] = {
        "machine": machine(),
        "versions": record.versions(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        },
        "fields": FIELDS,
    }
    if data["machine"]["load_before"] > BUSY * (os.cpu_count() or 1):
        print("this machine is busy: expect noise", file=sys.stderr)
    data["rows"] = record.collect(run(options))
    record.write(options.out, data)
    return record.refused(data["rows"])
