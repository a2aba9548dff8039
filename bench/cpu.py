"""The measurement on the CPU: which cases, on what machine, into which file."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from bench import heap, measure, memory, record, training
from bench.measure import Row
from bench.peers import OTHERS
from bench.workloads import LAYOUTS, PASSES, PATTERNS, RESNET, SHAPES, Workload, layouts

RECORD = record.RESULTS / "cpu.json"
AS_USERS_RUN = record.RESULTS / "cpu-default-heap-1.json"  # page faults vary: each of several processes writes a file

GRID: dict[str, Any] = {
    "sections": record.SECTIONS,
    "patterns": PATTERNS,
    "shapes": SHAPES,
    "layouts": tuple(LAYOUTS),
    "dtypes": ("float32", "bfloat16"),
    "threads": (1, 2),
    "passes": PASSES,
    "peers": OTHERS["cpu"],
}
# The default cases of patterns with more in them than batch norm. The whole grid of each would take an hour.
LONGER: dict[str, Any] = {"shapes": RESNET, "threads": (2,), "passes": ("both", "inference")}
# The cases that are measured as users run: enough to say what users may expect.
USERS: dict[str, Any] = {
    "sections": ("patterns", "training"),
    "patterns": PATTERNS,
    "shapes": RESNET,
    "layouts": tuple(LAYOUTS),
    "dtypes": ("float32",),
    "threads": (2,),
    "passes": ("both", "inference"),
    "peers": (),
}
# The depth of each network, its input, and whether there is time to compile it.
NETWORKS = ((18, "32x3x64x64", True), (50, "8x3x224x224", False))
QUICK: dict[str, Any] = {
    "sections": ("patterns", "memory"),
    "shapes": RESNET,
    "dtypes": ("float32",),
    "threads": (2,),
    "peers": (),
    "seconds": 1.0,
}
BUSY = 0.5  # load a core above which figures are not worth keeping


def machine() -> dict[str, Any]:
    """The processor: what matters for speed, without names of machine or user."""
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


def run_patterns(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The rows of one case after the other."""

    def values(name: str) -> Sequence[Any]:
        unless_chosen = LONGER if pattern != "bn" and name not in options.chosen else {}
        return unless_chosen.get(name, getattr(options, name))

    for pattern, dtype in product(options.patterns, options.dtypes):
        for shape, layout in product(values("shapes"), options.layouts):
            if layout not in layouts(shape):
                continue
            workload = Workload(shape, layout, dtype, pattern)
            for threads in values("threads"):
                torch.set_num_threads(threads)
                peers = measure.build(workload, options.peers)
                case = {"pattern": pattern, "shape": shape, "layout": layout, "dtype": dtype, "threads": threads}
                for name in values("passes"):
                    rows = measure.measure(workload, peers, name, options.seconds, options.rounds)
                    yield [case | row for row in rows]


def run_memory(options: argparse.Namespace) -> Iterator[list[Row]]:
    """The memory for one shape. In units of the input's size it is the same for all shapes."""
    shape = options.shapes[0]
    for pattern, layout, dtype in product(options.patterns, options.layouts, options.dtypes):
        case = {"pattern": pattern, "shape": shape, "layout": layout, "dtype": dtype}
        yield [case | row for row in memory.measure(Workload(shape, layout, dtype, pattern))]


def run_training(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Residual networks in float32, on all threads."""
    threads = max(options.threads)
    torch.set_num_threads(threads)
    for (depth, shape, compiled), layout in product(NETWORKS, options.layouts):
        others = [name for name in options.peers if name in training.PEERS and compiled]
        case = {"shape": shape, "layout": layout, "dtype": "float32"}
        rows = training.measure(training.Network(depth, **case), others, options.seconds, options.rounds)
        yield [{"pattern": f"ResNet-{depth}", **case, "threads": threads, **row} for row in rows]


RUN = dict(zip(record.SECTIONS, (run_patterns, run_memory, run_training), strict=True))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = record.parser("python -m bench", __doc__, GRID, rounds=7)
    parser.add_argument("--quick", action="store_true", help="float32, 2 threads, ResNet-50's shapes, no other peers")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N")
    heap.add_option(parser)
    options = parser.parse_args(argv)
    grid, path = (GRID, RECORD) if options.heap == "kept" else (USERS, AS_USERS_RUN)
    return record.settle(options, grid, grid | (QUICK if options.quick else {"seconds": 0.6}), path)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    data: dict[str, Any] = {
        "machine": machine(),
        "versions": record.versions(),
        "settings": {
            "seconds": options.seconds,
            "rounds": options.rounds,
            "heap": options.heap,
            "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        },
        "fields": {"patterns": measure.FIELDS, "memory": memory.FIELDS, "training": training.FIELDS},
    }
    if data["machine"]["load_before"] > BUSY * (os.cpu_count() or 1):
        print("this machine is busy: expect noise", file=sys.stderr)
    return record.collect((RUN[section](options) for section in options.sections), data, options.out)
