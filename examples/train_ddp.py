"""Trains a residual network on several processes, with statistics of the whole batch: torchrun starts it.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py

Before, the processes train in float64 beside one process that has the whole batch, and the largest difference of the
losses is printed. With --checkpoint a run that was killed continues bit for bit where its last checkpoint was written.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import images
import stacks
import torch
import torch.distributed as dist
from images import Images
from options import positive
from progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bn_ext

COMPARED = 20  # steps beside one process


class Place(NamedTuple):
    """The place of this process among those that train."""

    rank: int
    processes: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0


class Batch(NamedTuple):
    """The images of one process in a batch of ``whole`` images over all."""

    images: Tensor
    labels: Tensor
    whole: int


class Training:
    """A network that the processes of ``place`` train, or that this one trains alone."""

    def __init__(self, data: Images, place: Place, options: argparse.Namespace, dtype: torch.dtype) -> None:
        colors, side, _ = data.shape
        model = stacks.residual_network(options.seed, colors, side, data.classes).to(place.device, dtype)
        self.place, self.dtype = place, dtype
        synchronized = place.processes > 1 and not options.own_statistics
        convert = bn_ext.SyncBatchNorm.convert_sync_batchnorm if synchronized else bn_ext.convert
        self.model = convert(model)
        self.call = DistributedDataParallel(self.model) if place.processes > 1 else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), options.rate, momentum=0.9)

    def step(self, batch: Batch) -> Tensor:
        """A step of the optimizer. Returns the mean loss of the whole batch."""
        self.optimizer.zero_grad()
        output = self.call(batch.images.to(self.place.device, self.dtype))
        loss = nn.functional.cross_entropy(output, batch.labels.to(self.place.device), reduction="sum") / batch.whole
        (loss * self.place.processes).backward()  # DistributedDataParallel takes the mean of the gradients
        self.optimizer.step()
        loss = loss.detach()
        if self.place.processes > 1:
            dist.all_reduce(loss)
        return loss

    @torch.no_grad()
    def percent_right(self, data: Images, batch: int) -> float:
        """The percentage of images that are classified right; each process tests its share."""
        self.model.eval()
        right = torch.zeros((), device=self.place.device)
        for chosen in torch.arange(self.place.rank, len(data.labels), self.place.processes).split(batch):
            found = self.model(data.batch(chosen).to(self.place.device, self.dtype)).argmax(1)
            right += (found.cpu() == data.labels[chosen]).sum()
        self.model.train()
        if self.place.processes > 1:
            dist.all_reduce(right)
        return 100 * right.item() / len(data.labels)


def batches(data: Images, place: Place, size: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """The shares of one process in batches without end, from the one with number ``start`` on.

    Every epoch has an order of its own, which its number decides.
    """
    total = len(data.labels)
    in_epoch = max(1, total // size)
    epoch, done = divmod(start, in_epoch)
    while True:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed + epoch))
        for whole in order.split(size)[done:in_epoch]:
            mine = whole[place.rank :: place.processes]
            yield Batch(data.batch(mine), data.labels[mine], len(whole))
        epoch, done = epoch + 1, 0


def compare(data: Images, place: Place, options: argparse.Namespace) -> float:
    """The largest relative difference between the losses of all processes and of one, in float64."""
    together = Training(data, place, options, torch.float64)
    alone = Training(data, place._replace(rank=0, processes=1), options, torch.float64) if place.leads else None
    wholes = batches(data, place._replace(rank=0, processes=1), options.batch, options.seed)
    largest = 0.0
    for batch in islice(batches(data, place, options.batch, options.seed), COMPARED):
        loss = together.step(batch)
        if alone is not None:
            expected = alone.step(next(wholes))
            largest = max(largest, float((loss - expected).abs() / expected))
    return largest


def check(data: Images, place: Place, options: argparse.Namespace) -> bool:
    """Prints how far the losses are from those of one process, and returns whether that is as it should be."""
    difference = compare(data, place, options)
    if not place.leads:
        return True  # torchrun ends the others when the first process fails
    kind = "each process" if options.own_statistics else "the whole batch"
    print(
        f"statistics of {kind}: losses of {place.processes} processes and of one differ by {difference:.1e}", flush=True
    )
    if options.own_statistics or difference <= options.tolerance:
        return True
    print(f"error: they should differ by at most {options.tolerance:.0e}", file=sys.stderr)
    return False


def train(data: images.Data, place: Place, options: argparse.Namespace) -> None:
    training = Training(data.train, place, options, torch.float32)
    settings = {
        "processes": place.processes,
        "images": len(data.train.labels),
        **{name: getattr(options, name) for name in ("batch", "rate", "seed", "own_statistics", "side")},
    }
    start, loss = resume(training, settings, options.checkpoint)
    progress = Progress()
    progress.begin("training", options.steps)
    progress.done = start
    mine = batches(data.train, place, options.batch, options.seed, start)
    for step in range(start + 1, options.steps + 1):
        loss = training.step(next(mine))
        if place.leads:
            progress.advance()
        if options.checkpoint and (step % options.every == 0 or step == options.steps):
            save(training, settings, step, loss, options.checkpoint)
    right = training.percent_right(data.test, options.batch)
    if place.leads:
        print(
            f"after {max(start, options.steps)} steps: loss {float(loss):.4f}, {right:.1f} % of the test images right"
        )


def save(training: Training, settings: dict[str, Any], step: int, loss: Tensor, file: Path) -> None:
    """Replaces the file when all is on disk, so that there is a whole one at any time."""
    if not training.place.leads:
        return
    state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
    unfinished = file.with_name(file.name + ".part")
    with unfinished.open("wb") as opened:
        torch.save({**state, "settings": settings, "step": step, "loss": loss}, opened)
        opened.flush()
        os.fsync(opened.fileno())
    unfinished.replace(file)


def resume(training: Training, settings: dict[str, Any], file: Path | None) -> tuple[int, Tensor]:
    """Steps that were done, and the loss of the last. The first process reads the file, for all."""
    found: list[Any] = [None]
    if file is not None and training.place.leads and file.exists():
        found = [torch.load(file, map_location="cpu", weights_only=True)]
    if training.place.processes > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        return 0, torch.tensor(float("nan"))
    if found[0]["settings"] != settings:
        raise ValueError(f"{file} is of another run: {found[0]['settings']}, this one is {settings}")
    training.model.load_state_dict(found[0]["model"])
    training.optimizer.load_state_dict(found[0]["optimizer"])
    return found[0]["step"], found[0]["loss"]


@contextmanager
def processes() -> Iterator[Place]:
    """The process group that torchrun describes, or one process alone."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield Place(0, 1, device)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        gc.collect()  # a DistributedDataParallel that waits for the collector holds the group, and its threads
        dist.destroy_process_group()


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where the losses differ, 2 where data or checkpoint cannot be used."""
    options = parse(arguments)
    with processes() as place:
        try:
            data = images.digits() if options.data is None else images.folder(options.data, options.side)
            if place.processes > 1 and not check(data.train, place, options):
                return 1
            train(data, place, options)
        except (OSError, ValueError) as error:
            if place.leads:
                print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="images in a sub-folder a class (default: the digits)")
    parser.add_argument("--side", type=positive, metavar="N", default=64, help="of a folder's images, in pixels: 64")
    parser.add_argument("--own-statistics", action="store_true", help="each process has statistics of its own")
    parser.add_argument("--batch", type=positive, metavar="N", default=64, help="over all processes: %(default)s")
    parser.add_argument("--steps", type=positive, metavar="N", default=300, help="default: %(default)s")
    parser.add_argument("--rate", type=float, metavar="X", default=0.05, help="default: %(default)s")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="default: %(default)s")
    parser.add_argument("--tolerance", type=float, metavar="X", default=1e-9, help="of the losses: %(default)s")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="is continued if it is there, and written")
    parser.add_argument("--every", type=positive, metavar="N", default=50, help="steps a checkpoint: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
