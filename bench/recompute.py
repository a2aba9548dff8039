"""``python -m bench.recompute``: the memory and the time of training with outputs of batch norms made again.

Three ways to train each network are compared: torch's batch norms, fused, and fused with
``bn_ext.train.recompute_outputs``. The gradients of the last two have to be the same bits. Memory is measured twice: as
bytes that torch allocates, and as memory of the process, in a process of its own in which malloc gives large tensors
back when they are freed. Times are of whole steps, without an optimizer, taken in turn, in fresh processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from bench.cpu import machine
from bench.workloads import DTYPES, LAYOUTS
from bench.zoo import NETWORKS
from bn_ext.tools.timing import interleave, ratios
from bn_ext.tools.trial import Call, Trial

SIZE = 96
TORCH, FUSED, AGAIN = "torch", "fused", "made again"
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    TORCH: lambda model: model,
    FUSED: bn_ext.fuse,
    AGAIN: lambda model: bn_ext.train.recompute_outputs(bn_ext.fuse(model)),
}
FIELDS = {
    "kept, peak": "bytes that torch allocates between forward and backward, and at most in a step",
    "held, held_peak": "the same as memory of the process, resident",
    "median_ms": "time of a step, median over the rounds and then over the processes",
    "over_fused": "time of a step / time of the fused model's, median over the rounds and then over the processes",
}
# Every tensor of 64 KiB and more is mapped, and unmapped when it is freed.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}

MEMORY = ("kept", "peak", "held", "held_peak")
TIMES = ("median_ms", "over_fused")

Row = dict[str, Any]


def trials(network: str, layout: str, dtype: str, *ways: str) -> dict[str, Trial]:
    """A step of ``network`` in each way, with equal parameters. Half precision is by autocast."""
    torch.manual_seed(0)
    make, batch = NETWORKS[network]
    model = make().to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    images = torch.randn(batch, 3, SIZE, SIZE).to(memory_format=LAYOUTS[layout])

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long))

    half = None if dtype == "float32" else DTYPES[dtype]
    call = Call((images,), {}, loss, half, images.device)
    return {way: Trial(WAYS[way](copy.deepcopy(model)), call) for way in ways or WAYS}


def _resident(peak: bool = False) -> int:
    """Bytes of this process in memory, now or at most since :func:`_forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def held(trial: Trial) -> tuple[int, int]:
    """Memory of the process that the forward adds, and the most that a step does."""
    for _ in range(2):
        trial.step()
    trial.forget_gradients()
    before = _resident()
    loss = trial.loss()
    between = _resident()
    del loss
    trial.forget_gradients()
    before_step = _resident()
    _forget_peak()
    trial.step()
    return between - before, _resident(peak=True) - before_step


def times(trials: dict[str, Trial], seconds: float, rounds: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step in each way, and over the fused model's."""
    samples, _ = interleave({way: trial.step for way, trial in trials.items()}, seconds, rounds)
    return {way: (1e3 * median(samples[way]), median(ratios(samples, way, FUSED))) for way in trials}


def in_a_process(what: str, *arguments: object, environment: Mapping[str, str] = os.environ) -> Any:
    """:func:`held` or :func:`times` in a process of its own."""
    command = [sys.executable, "-m", "bench.recompute", f"--{what}", *map(str, arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def measure(network: str, layout: str, dtype: str, seconds: float, rounds: int, processes: int) -> list[Row]:
    """A row for each way, after the gradients were compared."""
    found = trials(network, layout, dtype)
    results = {way: trial.results() for way, trial in found.items()}
    same = all(torch.equal(tensor, results[AGAIN][name]) for name, tensor in results[FUSED].items())
    case = {"network": network, "layout": layout, "dtype": dtype, "batch": NETWORKS[network][1]}
    rows: dict[str, Row] = {}
    for way, trial in found.items():
        held = in_a_process("held", network, layout, dtype, way, environment=os.environ | MAPPED)
        rows[way] = {**case, "way": way, **dict(zip(MEMORY, (*trial.memory(), *held), strict=True))}
    del found, results, trial
    timed = [in_a_process("times", network, layout, dtype, seconds, rounds) for _ in range(processes)]
    for way, row in rows.items():
        row |= {f"{name}_over": row[name] / rows[TORCH][name] for name in MEMORY}
        if timed:
            row |= {
                name: median(times[way][i] for times in timed) for i, name in enumerate(("median_ms", "over_fused"))
            }
    rows[AGAIN]["same_bits"] = same
    return [*rows.values()]


def table(rows: Sequence[Row]) -> str:
    """The rows of each network, layout and dtype as one line of Markdown."""
    lines = [
        "| network | torch keeps | fused | made again | held | peak | torch / fused / made again (ms) | over fused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for start in range(0, len(rows), len(WAYS)):
        plain, fused, again = rows[start : start + len(WAYS)]
        name = f"{plain['network']}, {plain['layout']}, {plain['dtype']}, batch {plain['batch']}"
        is_timed = "over_fused" in again
        times = " / ".join(f"{row['median_ms']:.0f}" for row in (plain, fused, again)) if is_timed else ""
        over = f"{again['over_fused']:.2f}" if is_timed else ""
        bits = "" if again["same_bits"] else " **other bits**"
        lines.append(
            f"| {name} | {plain['kept'] / 1e6:.1f} MB | {fused['kept_over']:.0%} | {again['kept_over']:.0%}{bits} | "
            f"{again['held_over']:.0%} | {again['peak_over']:.0%} | {times} | {over} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--processes", type=int, default=5, help="in which steps are timed, a case; 0: memory alone")
    parser.add_argument("--seconds", type=float, default=5, help="of each process")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--held", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--times", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.held:
        (trial,) = trials(*options.held).values()
        print(json.dumps(held(trial)))
        return 0
    if options.times:
        *of, seconds, rounds = options.times
        print(json.dumps(times(trials(*of), float(seconds), int(rounds))))
        return 0
    rows: list[Row] = []
    for case in product(options.networks, options.layouts, options.dtypes):
        rows += measure(*case, options.seconds, options.rounds, options.processes)
        print(table(rows[-len(WAYS) :]).splitlines()[-1], flush=True)
        if options.out is not None:
            record = {"machine": machine(), "threads": torch.get_num_threads(), "fields": FIELDS, "rows": rows}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    return 0 if all(row.get("same_bits", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
