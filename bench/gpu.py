"""The measurement on a GPU: time on the device alone, of calls whose tensors no cache holds.

    python -m bench.gpu core           measures one of the parts; writes build/gpu/core.json after every case
    python -m bench.gpu_report --data build/gpu/*.json    tables and targets from what was measured

Inputs and outputs of one sample are together larger than the L2 cache twice over. What is worth most comes first.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, product
from time import perf_counter
from typing import Any

import torch

from bench import kernelbench, measure, memory, record, training
from bench.gpu_clock import copy_rate, sets_past, timed
from bench.gpu_plan import Case, in_words, limits_of, on_chip, plans_of
from bench.measure import COPY, COPY_MOVES, Row
from bench.peers import OTHERS, OURS, PEERS
from bench.problems import BLOCKS, DTYPES, LAYOUTS, LEAST_MOVES, PASSES, Problem, sizes_of

DEVICE = "cuda"
FOLDER = record.ROOT / "build" / "gpu"

# By what ResNet-50 spends on them: their size times how often they are normalized.
BY_VALUE = ("256x56x56", "512x28x28", "1024x14x14", "64x56x56", "2048x7x7")
BATCHES = (256, 32)


@dataclass(frozen=True)
class Part:
    """What is measured together; of a product the first factor changes last: dtypes, blocks, shapes, layouts."""

    sections: tuple[str, ...] = ("blocks",)
    blocks: tuple[str, ...] = ("bn",)
    shapes: tuple[str, ...] = tuple(f"{batch}x{shape}" for shape in BY_VALUE for batch in BATCHES)
    layouts: tuple[str, ...] = tuple(reversed(LAYOUTS))  # half precision is trained channels-last
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = ("cuDNN",)


PARTS = {
    "core": Part(sections=("blocks", "kernelbench"), passes=("forward", "backward")),
    "fused": Part(sections=("blocks", "memory"), blocks=BLOCKS[::-1], passes=("both", "inference")),
    "inductor": Part(  # which compiles each case for some ten seconds
        blocks=("bn+add+relu", "bn"),
        shapes=("256x256x56x56", "32x256x56x56", "32x512x28x28", "256x1024x14x14"),
        dtypes=("bfloat16",),
        passes=("both", "inference"),
        peers=OTHERS["cuda"],
    ),
    "training": Part(sections=("training",), peers=OTHERS["cuda"]),
}
SECTIONS = ("blocks", "kernelbench", "memory", "training")
KEPT = {"kernelbench": 30.0, "memory": 10.0}  # seconds that blocks leave to what comes after them
COMPILING = 0.5  # of the time, at most, to compile ahead

FIELDS = {
    "bytes_per_second": "the least bytes that the pass must move / its time",
    "over_bound_us": "the time beyond what the least bytes take at the rate of a copy of 1 GiB",
    "plan": "of ours, of each launch: strategy, kind of team, teams x blocks of each, slabs",
    "on_chip": "of ours: whether the plan keeps the tensors on chip between the two passes over them",
}
TRAINING = 3.0  # seconds of steps, at the least
TRAINED: dict[str, Any] = {"shape": "128x3x224x224", "layout": "channels_last", "dtype": "bfloat16"}


def machine() -> dict[str, Any]:
    """The GPU and its software."""
    properties = torch.cuda.get_device_properties(0)
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_gib": round(properties.total_memory / 2**30),
        "copy_bytes_per_second": copy_rate(),
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


class PersistentError(Exception):
    """An error after which the GPU refuses all further work of this process."""


def check_device() -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise PersistentError(str(error).splitlines()[0]) from error


def if_it_fits(cases: Iterator[list[Row]], what: str) -> Iterator[list[Row]]:
    try:
        yield from cases
    except torch.OutOfMemoryError:
        print(f"left out: {what}: the GPU has too little memory", flush=True)


def sets_of(shape: str, dtype: str, here: dict[str, Any]) -> int:
    return sets_past(here["l2_bytes"], math.prod(sizes_of(shape)) * DTYPES[dtype].itemsize)


def problem_of(case: Case, here: dict[str, Any]) -> Problem:
    shape, layout, dtype, block = case
    return Problem(shape, layout, dtype, block, DEVICE, sets_of(shape, dtype, here))


def noted(rows: list[Row], case: Case, here: dict[str, Any]) -> list[Row]:
    """The rows of a pass with the case before and the rates behind."""
    shape, layout, dtype, block = case
    tensor = math.prod(sizes_of(shape)) * DTYPES[dtype].itemsize
    limits = limits_of(here["gpu"])
    for row in rows:
        if "median_ms" in row:
            least = tensor * (COPY_MOVES if row["peer"] == COPY else LEAST_MOVES[block][row["pass"]])
            seconds = row["median_ms"] / 1e3
            row["bytes_per_second"] = least / seconds
            row["over_bound_us"] = 1e6 * (seconds - least / here["copy_bytes_per_second"])
        if row["peer"] == OURS:
            plans = plans_of(case, row["pass"], limits) if limits else []
            row["plan"] = "; ".join(map(in_words, plans)) or "unknown"
            row["on_chip"] = bool(plans) and on_chip(plans)
    return [{"block": block, "shape": shape, "layout": layout, "dtype": dtype, **row} for row in rows]


def run_case(
    made: Callable[[], Problem], names: Iterable[str], options: argparse.Namespace, here: dict[str, Any], end: float
) -> Iterator[list[Row]]:
    """The rows of one pass after the other, until the time is up."""
    problem = made()
    peers = measure.build(problem, options.peers)
    for name in names:
        if perf_counter() > end:
            return
        try:
            rows = measure.measure(problem, peers, name, options.seconds, options.rounds, timed)
        except Exception as error:  # of a call that had been validated
            rows = [{"pass": name, "peer": OURS, **measure.refusal(error)}]
        yield noted(rows, (problem.shape, problem.layout, problem.dtype, problem.block), here)


def run_blocks(
    cases: Iterable[tuple[Case, str]], options: argparse.Namespace, here: dict[str, Any], end: float
) -> Iterator[list[Row]]:
    for case, passes in groupby(cases, key=lambda both: both[0]):
        if perf_counter() > end:
            return
        rows = run_case(partial(problem_of, case, here), [name for _, name in passes], options, here, end)
        yield from if_it_fits(rows, " ".join(case))


def run_kernelbench(options: argparse.Namespace, here: dict[str, Any]) -> Iterator[list[Row]]:
    sets = sets_of(kernelbench.SHAPE, kernelbench.DTYPE, here)
    made = partial(kernelbench.Problem33, kernelbench.SHAPE, DEVICE, sets)
    for rows in run_case(made, [kernelbench.PASS], options, here, math.inf):
        yield [{**row, "block": kernelbench.NAME} for row in rows]


def run_memory(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Of the first shape: in tensors of its size all are alike."""
    for dtype, layout in product(options.dtypes, options.layouts):
        case = {"block": BLOCKS[-1], "shape": options.shapes[0], "layout": layout, "dtype": dtype}
        rows = memory.measure(Problem(case["shape"], layout, dtype, case["block"], DEVICE))
        yield [{**case, **row} for row in rows]


def run_training(options: argparse.Namespace) -> Iterator[list[Row]]:
    """ResNet-50, by the clock on the wall: the host's work belongs to a step. Compiled last, which takes longest."""
    eager = [name for name in options.peers if name != "Inductor"]
    known: set[str] = set()
    for others in [eager, *([options.peers] if "Inductor" in options.peers else [])]:
        rows = training.measure(50, **TRAINED, others=others, seconds=TRAINING, rounds=options.rounds, device=DEVICE)
        yield [{"block": "ResNet-50", **TRAINED, **row} for row in rows if row["peer"] not in known]
        known.update(row["peer"] for row in rows)


def cases_of(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Each case and pass, in the order in which they are measured."""
    factors = options.dtypes, options.blocks, options.shapes, options.layouts, options.passes
    return [((shape, layout, dtype, block), name) for dtype, block, shape, layout, name in product(*factors)]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    grid = {"sections": SECTIONS, "peers": OTHERS["cuda"]}
    parser = record.parser("python -m bench.gpu", __doc__, grid, rounds=5, out="build/gpu, by the part's name")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--within", type=float, default=300.0, help="seconds for all of it; what is left then is not")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile ahead")
    parser.add_argument("--resume", action="store_true", help="keep what the file has, measure what it has not")
    options = parser.parse_args(argv)
    defaults = asdict(PARTS[options.part]) | {"seconds": 0.15, "out": FOLDER / f"{options.part}.json"}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def section_of(row: Row) -> str:
    if row["block"] == kernelbench.NAME:
        return "kernelbench"
    return {memory.PASS: "memory", training.PASS: "training"}.get(row["pass"], "blocks")


def main(argv: Sequence[str] | None = None) -> int:
    begin = perf_counter()
    options = arguments(argv)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 1
    known = record.rows_of(options.out) if options.resume else []
    done = {(row["shape"], row["layout"], row["dtype"], row["block"], row["pass"]) for row in known}
    sections = [s for s in options.sections if s == "blocks" or s not in map(section_of, known)]
    cases = [(case, name) for case, name in cases_of(options) if (*case, name) not in done]
    cases = cases if "blocks" in sections else []
    if cases and "Inductor" in options.peers and options.workers > 1:
        compile_ahead(list(dict.fromkeys(case for case, _ in cases)), options.workers, COMPILING * options.within)
    here = machine()
    data: dict[str, Any] = {
        "machine": here,
        "versions": record.versions(),
        "settings": {"seconds": options.seconds, "rounds": options.rounds, "cases_left": len(cases)},
        "fields": {"blocks": measure.FIELDS | FIELDS, "memory": memory.FIELDS, "training": training.FIELDS},
        "rows": known,
    }
    end = begin + options.within - sum(KEPT.get(section, 0) for section in sections)
    run: dict[str, Callable[[], Iterator[list[Row]]]] = {
        "blocks": lambda: run_blocks(cases, options, here, end),
        "kernelbench": lambda: run_kernelbench(options, here),
        "memory": lambda: run_memory(options),
        "training": lambda: run_training(options),
    }

    def checked(section: str) -> Iterator[list[Row]]:
        for rows in if_it_fits(run[section](), section):
            data["settings"]["cases_left"] -= section == "blocks"
            yield rows
            check_device()

    try:
        return record.collect(map(checked, sections), data, options.out)
    except PersistentError as error:
        print(f"this process can do no more on the GPU: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if left := data["settings"]["cases_left"]:
            print(f"left out: {left} of {len(cases)} cases: the time was up", flush=True)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if status == os.EX_TEMPFAIL:  # on a GPU in that state the interpreter's end might abort
        os._exit(status)
    sys.exit(status)
