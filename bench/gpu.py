"""The measurement on a GPU: time on the device alone, of calls whose tensors no cache holds.

    python -m bench.gpu core           measures one of the parts; writes build/gpu/core.json after every case
    python -m bench.gpu_report --data build/gpu/*.json    tables and targets from what was measured

Inputs and outputs of one sample are together larger than the L2 cache twice over. What is worth most comes first.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import groupby, product
from time import perf_counter
from typing import Any

import torch

from bench import kernelbench, measure, memory, record, training
from bench.gpu_clock import copy_rate, sets_past, timed
from bench.gpu_plan import Case, in_words, limits_of, on_chip, plans_of
from bench.measure import COPY, COPY_MOVES, Row
from bench.peers import BASELINE, OTHERS, OURS, PEERS, Peer
from bench.workloads import DTYPES, LAYOUTS, LEAST_MOVES, PASSES, PATTERNS, Workload, sizes_of

DEVICE = "cuda"
FOLDER = record.ROOT / "build" / "gpu"

# In the order of their cost in ResNet-50: size times number of batch norms.
BY_VALUE = ("256x56x56", "512x28x28", "1024x14x14", "64x56x56", "2048x7x7")
BATCHES = (256, 32)


@dataclass(frozen=True)
class Part:
    """A product of cases to measure. Dtypes change last, then patterns, shapes and layouts."""

    sections: tuple[str, ...] = ("patterns",)
    patterns: tuple[str, ...] = ("bn",)
    shapes: tuple[str, ...] = tuple(f"{batch}x{shape}" for shape in BY_VALUE for batch in BATCHES)
    layouts: tuple[str, ...] = tuple(reversed(LAYOUTS))  # half precision is trained channels-last
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = ("cuDNN",)


PARTS = {
    "core": Part(sections=("patterns", "kernelbench"), passes=("forward", "backward")),
    "fused": Part(sections=("patterns", "memory"), patterns=PATTERNS[::-1], passes=("both", "inference")),
    "inductor": Part(  # which compiles each case for some ten seconds
        patterns=("bn+add+relu", "bn"),
        shapes=("256x256x56x56", "32x256x56x56", "32x512x28x28", "256x1024x14x14"),
        dtypes=("bfloat16",),
        passes=("both", "inference"),
        peers=OTHERS["cuda"],
    ),
    "training": Part(sections=("training",), peers=OTHERS["cuda"]),
}
SECTIONS = ("patterns", "kernelbench", "memory", "training")
KEPT = {"kernelbench": 30.0, "memory": 10.0}  # seconds that patterns leave to what comes after them
COMPILING = 0.5  # of the time, at most, to compile ahead
LONGEST = 20.0  # seconds for a case; three times as long where Inductor may compile it

FIELDS = {
    "status": measure.FIELDS["status"] + "; begun: the process that measured it hung or ended otherwise",
    "bytes_per_second": "the least bytes that the pass must move / its time",
    "over_bound_us": "the time beyond what the least bytes take at the rate of a copy of 1 GiB",
    "late": "samples that have time of the host in them, those to warm up included",
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
        peer = PEERS["Inductor"](Workload(*case, DEVICE))
        peer.call("both")()
        with torch.no_grad():
            peer.call("inference")()
    except Exception as error:  # it will fail again where that is recorded
        print(f"not compiled: {error}", file=sys.stderr)
    torch.cuda.empty_cache()


def compile_ahead(cases: Sequence[Case], workers: int, seconds: float) -> None:
    """Fills Inductor's cache by several processes: one process would take longer than all the rest."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        try:
            pool.map_async(_compiled, cases, chunksize=1).get(seconds)
        except multiprocessing.TimeoutError:
            print("not everything was compiled ahead", file=sys.stderr)


BEGUN = {"status": "begun", "reason": "the process ended before it was measured"}


class PersistentError(Exception):
    """An error after which the GPU refuses all further work of this process."""


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Lets SIGALRM end the process after ``seconds``: while it hangs, no other thread and no Python handler may run."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def check_device() -> None:
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise PersistentError(str(error).splitlines()[0]) from error


def sets_of(shape: str, dtype: str, here: dict[str, Any]) -> int:
    return sets_past(here["l2_bytes"], math.prod(sizes_of(shape)) * DTYPES[dtype].itemsize)


def workload_of(case: Case, here: dict[str, Any]) -> Workload:
    shape, layout, dtype, pattern = case
    return Workload(shape, layout, dtype, pattern, DEVICE, sets_of(shape, dtype, here))


def planned(case: Case, name: str, here: dict[str, Any]) -> Row:
    limits = limits_of(here["gpu"])
    plans = plans_of(case, name, limits) if limits else []
    return {"plan": "; ".join(map(in_words, plans)) or "unknown", "on_chip": bool(plans) and on_chip(plans)}


def noted(rows: list[Row], case: Case, here: dict[str, Any]) -> list[Row]:
    """The rows of a pass, with the case and the rates added."""
    shape, layout, dtype, pattern = case
    tensor = math.prod(sizes_of(shape)) * DTYPES[dtype].itemsize
    for row in rows:
        if "median_ms" in row:
            least = tensor * (COPY_MOVES if row["peer"] == COPY else LEAST_MOVES[pattern][row["pass"]])
            seconds = row["median_ms"] / 1e3
            row["bytes_per_second"] = least / seconds
            row["over_bound_us"] = 1e6 * (seconds - least / here["copy_bytes_per_second"])
        if row["peer"] == OURS:
            row.update(planned(case, row["pass"], here))
    return [{"pattern": pattern, "shape": shape, "layout": layout, "dtype": dtype, **row} for row in rows]


# A case: the row that stands for it until it is measured, and the call that measures it and returns its rows.
Task = tuple[Row, Callable[[], list[Row]]]


def row_of(case: Case, name: str, peer: str = OURS) -> Row:
    shape, layout, dtype, pattern = case
    return {"pattern": pattern, "shape": shape, "layout": layout, "dtype": dtype, "pass": name, "peer": peer}


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("pattern", "shape", "layout", "dtype", "pass", "peer"))


def attempted(task: Task) -> list[Row]:
    """The rows of the task; if it fails, a row that says why; if it needs more memory than there is, none."""
    known, rows = task
    try:
        return rows()
    except torch.OutOfMemoryError:
        print(f"left out: {' '.join(key_of(known))}: the GPU has too little memory", flush=True)
        return []
    except Exception as error:
        return [known | measure.refusal(error)]


def run_case(
    case: Case,
    made: Callable[[], Workload],
    names: Iterable[str],
    options: argparse.Namespace,
    here: dict[str, Any],
    end: float,
) -> Iterator[Task]:
    """One pass after the other, until the time is up."""

    @cache
    def built() -> tuple[Workload, dict[str, Peer | Row]]:
        workload = made()
        return workload, measure.build(workload, options.peers)

    def rows(name: str) -> list[Row]:
        late: Counter[str] = Counter()
        clock = partial(timed, late=late)
        found = measure.measure(*built(), name, options.seconds, options.rounds, clock)
        return [{**row, "late": late[row["peer"]]} for row in noted(found, case, here)]

    for name in names:
        if perf_counter() > end:
            return
        yield row_of(case, name) | planned(case, name, here), partial(rows, name)


def run_patterns(
    cases: Iterable[tuple[Case, str]], options: argparse.Namespace, here: dict[str, Any], end: float
) -> Iterator[Task]:
    for case, passes in groupby(cases, key=lambda both: both[0]):
        yield from run_case(case, partial(workload_of, case, here), [name for _, name in passes], options, here, end)


def run_kernelbench(options: argparse.Namespace, here: dict[str, Any]) -> Iterator[Task]:
    sets = sets_of(kernelbench.SHAPE, kernelbench.DTYPE, here)
    made = partial(kernelbench.Problem33, kernelbench.SHAPE, DEVICE, sets)
    case = (kernelbench.SHAPE, kernelbench.LAYOUT, kernelbench.DTYPE, "bn")
    named = {"pattern": kernelbench.NAME}
    ((known, rows),) = run_case(case, made, [kernelbench.PASS], options, here, math.inf)
    yield known | named, lambda: [row | named for row in rows()]


def run_memory(options: argparse.Namespace) -> Iterator[Task]:
    """The memory for the first shape. In units of the input's size it is the same for all shapes."""

    def rows(case: Case, known: Row) -> list[Row]:
        return [known | row for row in memory.measure(Workload(*case, DEVICE))]

    for dtype, layout in product(options.dtypes, options.layouts):
        case = (options.shapes[0], layout, dtype, PATTERNS[-1])
        known = row_of(case, memory.PASS)
        yield known, partial(rows, case, known)


def run_training(options: argparse.Namespace) -> Iterator[Task]:
    """ResNet-50, by wall-clock time, because a step includes the host's work. Compiled last, which takes longest."""
    known = {"pattern": "ResNet-50", **TRAINED, "pass": training.PASS}
    network = training.Network(50, **TRAINED, device=DEVICE)

    def rows(always: Sequence[str], others: Sequence[str], left_out: Sequence[str] = ()) -> list[Row]:
        found = training.measure(network, others, TRAINING, options.rounds, always)
        return [known | row for row in found if row["peer"] not in left_out]

    eager = [name for name in options.peers if name != "Inductor"]
    yield known | {"peer": OURS}, partial(rows, (BASELINE, OURS), eager)
    if "Inductor" in options.peers:
        yield known | {"peer": training.COMPILED}, partial(rows, (BASELINE,), ["Inductor"], left_out=(BASELINE,))


def cases_of(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """Each case and pass, in the order in which they are measured."""
    factors = options.dtypes, options.patterns, options.shapes, options.layouts, options.passes
    return [((shape, layout, dtype, pattern), name) for dtype, pattern, shape, layout, name in product(*factors)]


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


def main(argv: Sequence[str] | None = None) -> int:
    begin = perf_counter()
    options = arguments(argv)
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("there is no GPU", file=sys.stderr)
        return 1
    known = record.rows_of(options.out) if options.resume else []
    done = set(map(key_of, known))
    cases = [(case, name) for case, name in cases_of(options) if key_of(row_of(case, name)) not in done]
    cases = cases if "patterns" in options.sections else []
    if cases and "Inductor" in options.peers and options.workers > 1:
        compile_ahead(list(dict.fromkeys(case for case, _ in cases)), options.workers, COMPILING * options.within)
    with watched(LONGEST):
        here = machine()
    data: dict[str, Any] = {
        "machine": here,
        "versions": record.versions(),
        "settings": {"seconds": options.seconds, "rounds": options.rounds, "cases_left": len(cases)},
        "fields": {"patterns": measure.FIELDS | FIELDS, "memory": memory.FIELDS, "training": training.FIELDS},
        "rows": known,
    }
    end = begin + options.within - sum(KEPT.get(section, 0) for section in options.sections)
    run: dict[str, Callable[[], Iterator[Task]]] = {
        "patterns": lambda: run_patterns(cases, options, here, end),
        "kernelbench": lambda: run_kernelbench(options, here),
        "memory": lambda: run_memory(options),
        "training": lambda: run_training(options),
    }

    longest = 3 * LONGEST if "Inductor" in options.peers else LONGEST

    def checked(section: str) -> Iterator[list[Row]]:
        for known, rows in run[section]():
            if key_of(known) in done:
                continue
            yield [known | BEGUN]
            with watched(longest):
                found = attempted((known, rows))
                data["rows"].pop()
                if section == "patterns":
                    data["settings"]["cases_left"] -= 1
                yield found
                check_device()

    try:
        return record.collect(map(checked, options.sections), data, options.out)
    except PersistentError as error:
        print(f"this process can do no more on the GPU: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if left := data["settings"]["cases_left"]:
            print(f"left out: {left} of {len(cases)} cases: the time was up", flush=True)


if __name__ == "__main__":
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it hung
    status = main()
    sys.stdout.flush()
    if status == os.EX_TEMPFAIL:  # on a GPU in that state the interpreter's end might abort
        os._exit(status)
    sys.exit(status)
