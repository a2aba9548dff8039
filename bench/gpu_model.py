"""A model of the time that a plan takes on an H100. It measures nothing: it orders work on the kernels.

    python -m bench.gpu_model           prints the layers of ResNet-50, as percent of a copy's rate
    python -m bench.gpu_model --page P  writes them to the page P, between the marks

docs/gpu_model.md has the constants, where they come from, and what the model leaves out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench.gpu_plan import Case, in_words, plan_of
from bench.report import markdown, place
from bench.workloads import LAYOUTS, LEAST_MOVES, RESNET, sizes_of
from bn_ext._C import LaunchPlan

# What an H100 has. Times are in microseconds, rates in bytes per microsecond.
COPY = 3.0e6
LATENCY = 0.95  # of memory, loaded
FIRST = 0.7  # of memory, before the first byte of a phase
ISSUED = 4.4e3 * 512  # instructions a multiprocessor issues, times the bytes that a warp loads in one
L2 = 5.5e6
L2_LATENCY = 0.17
THREADS = 512  # of a multiprocessor, by registers
SHARED = 228 << 10
RESERVED = 1 << 10
GPCS = (18, 18, 18, 16, 16, 16, 16, 14)  # multiprocessors that a cluster can be in: 132
MULTIPROCESSORS = sum(GPCS)

# What the kernels' loops take, by the size of a type: SUMMED and APPLIED are instructions per 512 bytes, UNDER_WAY is
# the packs of all tensors that a thread has under way.
SUMMED = {4: 62, 2: 98}
APPLIED = {4: 65, 2: 88}
UNDER_WAY = {"forward": {4: 8, 2: 4}, "backward": {4: 8, 2: 8}, "inference": {4: 8, 2: 4}}


@dataclass(frozen=True)
class Kernel:
    """The constants that a change to the kernel changes, in microseconds unless a comment says otherwise."""

    start: float = 0.85  # to the first load
    settle: float = 0.1  # the forward's, a barrier and reads of shared memory
    reduce: float = 0.6  # both sums over a block
    cluster: float = 0.5  # a barrier, and loads from other blocks
    grid: float = 0.8  # a barrier
    exchange_loads: int = 8  # under way in a thread that adds up the sums of other blocks
    finish: float = 0.8
    end: float = 0.1  # of a cluster, a wait for blocks that arrived long before
    overlap: float = 0.3  # of idle memory, which the other block of a multiprocessor hides after the first wave


NOW = Kernel()

TYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
MARKS = "<!-- gpu_model:begin -->\n", "<!-- gpu_model:end -->\n"


class Steps(NamedTuple):
    """Microseconds of one wave of slabs, step by step."""

    start: float
    load: float
    reduce: float
    exchange: float
    finish: float
    store: float
    end: float

    @property
    def idle(self) -> float:
        """Memory is not moved."""
        return sum(self) - self.load - self.store


class Modeled(NamedTuple):
    """A plan, as the model sees it: its waves, and the time of all."""

    waves: list[Steps]
    microseconds: float
    of_copy: float  # the rate at which the least bytes move, of a copy's


def at_once(plan: LaunchPlan) -> int:
    """Blocks on a multiprocessor."""
    return max(1, min(THREADS // plan.threads, SHARED // (plan.shared_bytes + RESERVED)))


def together(plan: LaunchPlan) -> int:
    """Blocks that wait for each other, and so have to be there at the same time."""
    return plan.team_blocks if plan.sums else 1


def teams_at_once(plan: LaunchPlan) -> int:
    """The teams of a launch that are on the GPU at the same time."""
    if plan.team == "grid":
        return plan.teams
    per_multiprocessor = at_once(plan)
    return sum(gpc * per_multiprocessor // together(plan) for gpc in GPCS)


def exchange(plan: LaunchPlan, kernel: Kernel) -> float:
    """Microseconds in which every block of a team loads the sums of all others."""
    if plan.team == "cluster":
        return kernel.cluster
    if plan.team == "block":
        return 0
    sums = 2 * plan.channels
    lanes = 32
    while lanes > 1 and sums * lanes > plan.threads:
        lanes //= 2
    rounds = -(-sums * lanes // plan.threads)
    batches = -(-plan.team_blocks // (lanes * kernel.exchange_loads))
    moved = plan.teams * plan.team_blocks**2 * sums * 8
    return kernel.grid + max(rounds * batches * L2_LATENCY, moved / L2)


def steps(plan: LaunchPlan, direction: str, size: int, teams: int, written: int, kernel: Kernel) -> Steps:
    """The steps of a wave of ``teams``, each of which works on a slab. The whole launch writes ``written`` bytes."""
    blocks = teams * together(plan)
    in_flight = blocks * plan.threads * UNDER_WAY[direction][size] * 16 / LATENCY
    busy = min(blocks, MULTIPROCESSORS)
    share = blocks / (plan.slabs * plan.team_blocks)
    load = (plan.bytes_moved - written) * share / min(COPY, in_flight, busy * ISSUED / SUMMED[size])
    store = written * share / min(COPY, busy * ISSUED / APPLIED[size])
    if not plan.sums:
        return Steps(kernel.start + FIRST, load, 0, 0, 0, store, 0)
    return Steps(
        start=kernel.start + FIRST,
        load=load,
        reduce=kernel.reduce + kernel.settle * (direction == "forward"),
        exchange=exchange(plan, kernel),
        finish=kernel.finish,
        store=store,
        end=kernel.end * (plan.team == "cluster"),
    )


def model(case: Case, direction: str, kernel: Kernel = NOW, plan: LaunchPlan | None = None) -> Modeled:
    """The time of one launch. Its waves follow each other. Where a multiprocessor has two blocks, which are in step in
    the first wave only, each hides a part of the other's idle time."""
    shape, _, dtype, pattern = case
    plan = plan or plan_of(case, direction, "h100")
    tensor = math.prod(sizes_of(shape)) * TYPES[dtype]
    most, teams = teams_at_once(plan), plan.slabs * plan.team_blocks // together(plan)
    waves = [
        steps(plan, direction, TYPES[dtype], min(most, teams - first), tensor, kernel)
        for first in range(0, teams, most)
    ]
    hidden = kernel.overlap if at_once(plan) > 1 and plan.teams > 1 else 0
    total = sum(waves[0])
    for wave in waves[1:]:
        started = kernel.start if plan.team == "grid" else 0  # its blocks go on with the next slab
        total += sum(wave) - started - hidden * (wave.idle - started)
    return Modeled(waves, total, LEAST_MOVES[pattern][direction] * tensor / COPY / total)


COLUMNS = [(dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("forward", "backward")]


def cases(batch: int) -> Iterator[tuple[str, str]]:
    shapes = ["x".join([str(batch), *shape.split("x")[1:]]) for shape in RESNET]
    yield from product(shapes, LAYOUTS)


def mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(batch: int, modeled: Callable[[Case, str], Modeled] = model) -> str:
    """Percent of a copy's rate, with the team of each plan and its blocks."""
    body, found = [], []
    for shape, layout in cases(batch):
        row = [place({"shape": shape, "layout": layout})]
        of_row = []
        for dtype, direction in COLUMNS:
            case = shape, layout, dtype, "bn"
            plan = plan_of(case, direction, "h100")
            of_row.append(modeled(case, direction).of_copy)
            streams = " streaming" if plan.strategy == "streaming" else ""
            blocks = "" if plan.team == "block" else f" {plan.team_blocks}"
            row.append(f"{of_row[-1]:.0%} {plan.team}{blocks}{streams}".replace("%", " %"))
        body.append(row)
        found.append(of_row)
    body.append(["geometric mean", *(f"{mean(list(column)):.0%}".replace("%", " %") for column in zip(*found))])
    return markdown(["model, no measurement", *(f"{dtype} {direction}" for dtype, direction in COLUMNS)], body)


def tables() -> str:
    return "\n\n".join(table(batch) for batch in (32, 256)) + "\n"


def means(modeled: Callable[[Case, str], Modeled] = model) -> list[str]:
    """The geometric mean of each column of the tables, over both batches."""
    places = [place for batch in (32, 256) for place in cases(batch)]
    return [
        f"{mean([modeled((*place, dtype, 'bn'), direction).of_copy for place in places]):.1%}".replace("%", " %")
        for dtype, direction in COLUMNS
    ]


def explained(case: Case, direction: str) -> str:
    """The first wave of a plan, step by step."""
    plan = plan_of(case, direction, "h100")
    found = model(case, direction)
    named = ", ".join(f"{name} {value:.1f}" for name, value in found.waves[0]._asdict().items())
    return (
        f"{in_words(plan)}\nwaves: {len(found.waves)}, the first one in microseconds: {named}\n"
        f"all: {found.microseconds:.1f}, {found.of_copy:.0%} of a copy's rate. A model, no measurement."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--explain", nargs=4, metavar=("SHAPE", "LAYOUT", "DTYPE", "DIRECTION"))
    args = parser.parse_args()
    if args.explain:
        *case, direction = args.explain
        print(explained((*case, "bn"), direction))
        return
    if args.page:
        before, rest = args.page.read_text().split(MARKS[0])
        args.page.write_text(before + MARKS[0] + tables() + MARKS[1] + rest.split(MARKS[1])[1])
        return
    print("A model, no measurement: percent of a copy's rate on an H100.\n")
    print(tables())
    print("geometric means over both: " + ", ".join(means()))
    print("; ".join(f"{field.name} {getattr(NOW, field.name)}" for field in fields(Kernel)))


if __name__ == "__main__":
    main()
