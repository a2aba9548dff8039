"""``python -m bench.sync``: a step of ResNet-18 in several processes, with and without synchronized statistics.

The processes are on this machine, with gloo and a thread each. Results are compared with one process that has the whole
batch before anything is timed; steps are taken in turn, the collectives of the batch norms alone among them. A table of
what the statistics of a step move, by formula, follows.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bn_ext
from bench import heap
from bench.networks import resnet
from bench.workloads import sizes_of
from bn_ext.tools.timing import interleave, ratios

PLAIN, SYNC, COLLECTIVES = "unsynchronized", "synchronized", "collectives alone"
FIELDS = {
    "median_ms": "of a step, forward, backward and SGD, the slowest process of each round",
    "over_plain": "time / time of the unsynchronized step, median over the rounds",
    "bytes": "that a process receives in a step, if gathering passes every row on once and adding up goes round a ring",
    "waits": "times that a step waits for a GPU",
    "load": "of the machine, before it was measured: processes that wanted a core",
}
RANKS = (2, 8, 64, 256, 1024)
OURS, TORCHS = "ours", "torch's"

Row = dict[str, Any]


def traffic(channels: Sequence[int], ranks: int, whose: str) -> Row:
    """The bytes, collectives and waits of a step whose batch norms have so many ``channels``, by formula.

    torch's gathers mean, invstd and count in float32, adds up two sums, and waits for the GPU where it leaves out empty
    processes (torch/nn/modules/_functions.py).
    """
    ours = whose == OURS
    size, gathered, summed = (8, 3, 1) if ours else (4, 1, 0)  # bytes of a number, numbers besides those of channels
    moved = sum((ranks - 1) * (2 * c + gathered) + 2 * (ranks - 1) / ranks * (2 * c + summed) for c in channels)
    return {
        "whose": whose,
        "ranks": ranks,
        "bytes": round(size * moved),
        "collectives": 2 * len(channels),
        "waits": 0 if ours else len(channels),
    }


def channels_of(model: nn.Module) -> list[int]:
    return [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def validated(model: nn.Module, synchronized: nn.Module, x: Tensor) -> None:
    """Compares one process with the whole batch and this process with its part of it."""
    whole, part = copy.deepcopy(model).double(), copy.deepcopy(synchronized).double()
    ranks, rank = dist.get_world_size(), dist.get_rank()
    expected, output = whole(x.double()), part(x.double().chunk(ranks)[rank])
    torch.testing.assert_close(output, expected.chunk(ranks)[rank], rtol=1e-9, atol=1e-9)
    expected.square().sum().backward()
    output.square().sum().backward()
    for theirs, ours in zip(whole.parameters(), part.parameters(), strict=True):
        assert theirs.grad is not None and ours.grad is not None
        dist.all_reduce(ours.grad)
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8 * scale)


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def call() -> None:
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()

    return call


def meetings(channels: Sequence[int]) -> Callable[[], None]:
    """The collectives of the batch norms of a step, without anything between them."""
    ranks = dist.get_world_size()
    rows = [
        (torch.zeros(2 * c + 3, dtype=torch.float64), torch.zeros(2 * c + 1, dtype=torch.float64)) for c in channels
    ]

    def call() -> None:
        for packed, _ in rows:
            dist.all_gather([torch.empty_like(packed) for _ in range(ranks)], packed)
        for _, packed in reversed(rows):
            dist.all_reduce(packed)

    return call


def met(call: Callable[[], None]) -> Callable[[], None]:
    def together() -> None:
        dist.barrier()
        call()

    return together


def measured(shape: str, width: int, rounds: int) -> list[Row]:
    """The rows of this process, which are those of all: a round takes as long as its slowest process."""
    torch.manual_seed(0)
    model = bn_ext.convert(resnet(18, classes=10, width=width))
    synchronized = bn_ext.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    x = torch.randn(sizes_of(shape))
    validated(model, synchronized, x)
    mine = x.chunk(dist.get_world_size())[dist.get_rank()]
    calls: dict[str, Callable[[], object]] = {
        PLAIN: met(step(model, mine)),
        SYNC: met(step(synchronized, mine)),
        COLLECTIVES: met(meetings(channels_of(model))),
    }
    samples, _ = interleave(calls, 0, rounds, shortest=0)  # one call a sample, and as many in every process
    slowest = torch.tensor([samples[way] for way in calls], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    samples = dict(zip(calls, slowest.tolist(), strict=True))
    return [
        {"way": way, "median_ms": 1e3 * median(samples[way]), "over_plain": median(ratios(samples, way, PLAIN))}
        for way in calls
    ]


def worker(rank: int, ranks: int, folder: str, shape: str, width: int, rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = measured(shape, width, rounds)
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    gc.collect()  # a DistributedDataParallel that waits for the collector holds the group
    dist.destroy_process_group()


def in_processes(ranks: int, shape: str, width: int, rounds: int) -> list[Row]:
    start = multiprocessing.get_context("forkserver").Process
    with tempfile.TemporaryDirectory() as folder:
        workers = [start(target=worker, args=(rank, ranks, folder, shape, width, rounds)) for rank in range(ranks)]
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        if any(process.exitcode for process in workers):
            raise RuntimeError(f"a process ended with {[process.exitcode for process in workers]}")
        return json.loads(Path(folder, "0.json").read_text())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heap.add_option(parser)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", default="32x3x64x64", help="of the whole batch")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    options = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    rows = in_processes(options.ranks, options.shape, options.width, options.rounds)
    for row in rows:
        print(f"{row['way']}: {row['median_ms']:.2f} ms, {row['over_plain']:.3f} of unsynchronized", flush=True)
    table = []
    for depth in (18, 50):
        channels = channels_of(resnet(depth))
        for whose in (OURS, TORCHS):
            table += [{"network": f"ResNet-{depth}", **traffic(channels, ranks, whose)} for ranks in RANKS]
    for row in table:
        print(
            "{network}, {ranks} ranks, {whose}: {bytes:,} bytes, {collectives} collectives, {waits} waits".format(**row)
        )
    if options.out is not None:
        record = {"fields": FIELDS, "torch": torch.__version__, "heap": options.heap, "threads": 1, "load": load}
        settings = {"ranks": options.ranks, "shape": options.shape, "rounds": options.rounds}
        options.out.write_text(json.dumps({**record, **settings, "rows": rows, "traffic": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    heap.restart(heap.chosen(sys.argv[1:]))
    sys.exit(main())
