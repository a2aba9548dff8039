"""The measurement on a GPU: time on the device alone, of calls whose tensors no cache holds.

    python -m bench.gpu            measure, write bench/results/gpu.json and gpu.png
    python -m bench.gpu_report     table and targets from that file

Inputs and outputs of one sample are together larger than the L2 cache twice over.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from time import perf_counter
from typing import Any

import torch

from bench import gpu_report, measure, memory, record, training
from bench.measure import Row
from bench.peers import OTHERS, OURS, PEERS
from bench.problems import BLOCKS, DTYPES, LAYOUTS, PASSES, RESNET, Problem, sizes_of
from bench.timing import interleave
from bn_ext._C import LaunchPlan, launch_plan

DEVICE = "cuda"
RECORD = record.RESULTS / "gpu.json"
BATCHES = (32, 256)
GRID: dict[str, Any] = {
    "sections": record.SECTIONS,
    "blocks": BLOCKS,
    "shapes": tuple(f"{batch}x{shape.partition('x')[2]}" for batch in BATCHES for shape in RESNET),
    "layouts": tuple(LAYOUTS),
    "dtypes": ("float32", "bfloat16", "float16"),  # should the time run out, the last is like the one before
    "passes": PASSES,
    "peers": OTHERS["cuda"],
}
ON_CHIP = {"on_chip": "whether the plan keeps the tensors on chip between the two passes over them"}
TRAINED: dict[str, Any] = {"shape": "128x3x224x224", "layout": "channels_last", "dtype": "bfloat16"}
TRAINING_SHARE = 0.4  # of the time, left for the section that compiles a whole network twice

Case = tuple[str, str, str, str]  # shape, layout, dtype, block


class GpuClock:
    """Takes samples of GPU time. The GPU sleeps until all calls of a sample are queued: it never waits for the host."""

    CYCLES = 2e9  # a second, of the fastest GPU
    FIRST = 2e-3  # seconds that calls not known yet are given
    MARGIN = 2.0
    ATTEMPTS = 5

    def __init__(self) -> None:
        self._queueing: dict[int, float] = {}

    def sample(self, call: Callable[[], object], times: int) -> float:
        """Seconds per call over ``times`` calls."""
        for _ in range(self.ATTEMPTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(self._queueing.get(id(call), self.FIRST) * self.CYCLES))
            start.record()
            begin = perf_counter()
            for _ in range(times):
                call()
            self._queueing[id(call)] = self.MARGIN * (perf_counter() - begin)
            in_time = not start.query()
            end.record()
            end.synchronize()
            if in_time:
                break
        return start.elapsed_time(end) / 1e3 / times


def timed(calls: dict[str, Callable[[], object]], seconds: float, rounds: int) -> tuple[dict[str, list[float]], int]:
    """A turn over the sets is long enough for a sample."""
    return interleave(calls, seconds, rounds, GpuClock().sample, shortest=0)


def sets_past(cache: int, tensor: int) -> int:
    """How many tensors of so many bytes are together twice as large as the cache; no less than two take turns."""
    return max(2, math.ceil(2 * cache / tensor))


# Words of a GPU's name, and the limits that they stand for.
LIMITS = {
    "h100": "h100",
    "h200": "h100",
    "b200": "b200",
    "a100": "a100",
    "5090": "rtx5090",
    "4090": "rtx4090",
    "t4": "t4",
}


def limits_of(gpu: str) -> str | None:
    """The named limits for a GPU of this name."""
    words = gpu.lower().replace("-", " ").split()
    return next((limits for word, limits in LIMITS.items() if word in words), None)


def plan_of(case: Case, direction: str, limits: str) -> LaunchPlan:
    shape, layout, dtype, block = case
    n, c, *spatial = sizes_of(shape)
    order = "planar" if layout == "contiguous" else "interleaved"
    activation = "relu" if "relu" in block else "identity"
    return launch_plan(
        n,
        c,
        math.prod(spatial),
        gpu=limits,
        dtype=dtype,
        layout=order,
        direction=direction,
        activation=activation,
        residual="add" in block,
    )


def on_chip(case: Case, name: str, limits: str | None) -> bool:
    """Whether each direction of the pass finds its tensors on chip the second time."""
    directions = ("forward", "backward") if name == "both" else (name,)
    return limits is not None and all(
        plan_of(case, direction, limits).strategy in ("small", "resident") for direction in directions
    )


def machine() -> dict[str, Any]:
    """The GPU and its software."""
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gib": round(properties.total_memory / 2**30),
        "driver": (record.output(*query).splitlines() or ["unknown"])[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _compiled(case: Case) -> None:
    try:
        peer = PEERS["Inductor"](Problem(*case, DEVICE))
        peer.call("both")()
        with torch.no_grad():
            peer.call("inference")()
    except Exception as error:  # it will fail again where that is recorded
        print(f"not compiled: {error}", file=sys.stderr)
    torch.cuda.empty_cache()


def compile_ahead(cases: Sequence[Case], workers: int, seconds: float) -> None:
    """Fills Inductor's cache by several processes: one after the other would take longer than all the rest."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        try:
            pool.map_async(_compiled, cases, chunksize=1).get(seconds)
        except multiprocessing.TimeoutError:
            print("not everything was compiled ahead", file=sys.stderr)


def run_blocks(
    cases: Sequence[Case], options: argparse.Namespace, machine: dict[str, Any], end: float
) -> Iterator[list[Row]]:
    """The rows of one case after the other, until the time is up."""
    limits = limits_of(machine["gpu"])
    for case in cases:
        shape, layout, dtype, block = case
        tensor = math.prod(sizes_of(shape)) * DTYPES[dtype].itemsize
        problem = Problem(*case, DEVICE, sets_past(machine["l2_bytes"], tensor))
        peers = measure.build(problem, options.peers)
        for name in options.passes:
            if perf_counter() > end:
                return
            rows = measure.measure(problem, peers, name, options.seconds, options.rounds, timed)
            for row in rows:
                if row["peer"] == OURS:
                    row["on_chip"] = on_chip(case, name, limits)
            yield [{"block": block, "shape": shape, "layout": layout, "dtype": dtype, **row} for row in rows]


def run_memory(cases: Sequence[Case]) -> Iterator[list[Row]]:
    """Of the first shape: in tensors of its size all are alike."""
    for shape, layout, dtype, block in cases:
        if shape == cases[0][0] and block == BLOCKS[-1]:
            rows = memory.measure(Problem(shape, layout, dtype, block, DEVICE))
            yield [{"block": block, "shape": shape, "layout": layout, "dtype": dtype, **row} for row in rows]


def run_training(options: argparse.Namespace) -> Iterator[list[Row]]:
    """ResNet-50, by the clock on the wall: the host's work belongs to a step."""
    rows = training.measure(50, **TRAINED, others=options.peers, seconds=3.0, rounds=options.rounds, device=DEVICE)
    yield [{"block": "ResNet-50", **TRAINED, **row} for row in rows]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = record.parser("python -m bench.gpu", __doc__, GRID, rounds=5)
    parser.add_argument("--within", type=float, default=285.0, help="seconds for all of it; what is left then is not")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead")
    return record.settle(parser.parse_args(argv), GRID, GRID | {"seconds": 0.15}, RECORD)


def main(argv: Sequence[str] | None = None) -> int:
    end = perf_counter()
    options = arguments(argv)
    end += options.within
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 1
    cases = [(s, la, d, b) for d, b, s, la in product(options.dtypes, options.blocks, options.shapes, options.layouts)]
    if "blocks" in options.sections and "Inductor" in options.peers and options.workers > 1:
        compile_ahead(cases, options.workers, options.within / 3)
    here = machine()
    data: dict[str, Any] = {
        "machine": here,
        "versions": record.versions(),
        "settings": {"seconds": options.seconds, "rounds": options.rounds},
        "fields": {"blocks": measure.FIELDS | ON_CHIP, "memory": memory.FIELDS, "training": training.FIELDS},
    }
    if "training" in options.sections:
        end -= TRAINING_SHARE * options.within
    data["settings"]["cases_left_for_want_of_time"] = len(cases) * len(options.passes)

    def counted() -> Iterator[list[Row]]:
        for rows in run_blocks(cases, options, here, end):
            data["settings"]["cases_left_for_want_of_time"] -= 1
            yield rows

    run = {
        "blocks": counted,
        "memory": lambda: run_memory(cases),
        "training": lambda: run_training(options),
    }
    status = record.collect((run[section]() for section in options.sections), data, options.out)
    if "blocks" in options.sections:
        gpu_report.main(["--data", str(options.out)])
    return status


if __name__ == "__main__":
    sys.exit(main())
