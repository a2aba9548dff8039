"""Trains a stack of sigmoids without batch norm, with torch's and with bn_ext's, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import stacks
import torch
from mnist import Data, Digits
from torch import Tensor, nn

DEPTHS = (3, 6)
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
# With more steps, three layers without batch norm catch up: after 1,200 they are at 94.4 % at their best rate, with
# batch norm at 94.5 % (means of 3 seeds).
STEPS = 800
SEEDS = 4
BATCH = 60
EVALUATIONS = 40


@dataclass
class Run:
    """The training of one network, and what it showed."""

    depth: int
    norm: str
    rate: float
    seed: int
    seconds: list[float] = field(default_factory=list)  # of CPU time, for each step
    steps: list[int] = field(default_factory=list)  # done at each evaluation
    accuracy: list[float] = field(default_factory=list)  # in percent of the test images


def binarized(images: Tensor) -> Tensor:
    return (images >= 128).float()


def grey(images: Tensor) -> Tensor:
    return images.unsqueeze(1) / 255


def batches(digits: Digits, prepare: Callable[[Tensor], Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches without end, every epoch in another order, its incomplete last one left out."""
    generator = torch.Generator().manual_seed(seed)
    whole = len(digits.labels) // BATCH * BATCH
    while True:
        for chosen in torch.randperm(len(digits.labels), generator=generator)[:whole].view(-1, BATCH):
            yield prepare(digits.images[chosen]), digits.labels[chosen]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def percent_right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = (model(images).argmax(1) == labels).double().mean().item()
    model.train()
    return 100 * right


def train(depth: int, rate: float, seed: int, data: Data, steps: int) -> list[Run]:
    """Every norm from the same weights on the same batches, a step each in turn, so that all are timed alike."""
    runs = [Run(depth, norm, rate, seed) for norm in stacks.NORMS]
    models = [stacks.sigmoids(depth, run.norm, seed) for run in runs]
    turns = [(run, model, torch.optim.SGD(model.parameters(), rate)) for run, model in zip(runs, models)]
    test = binarized(data.test.images), data.test.labels
    every = max(1, steps // EVALUATIONS)

    for step, batch in enumerate(islice(batches(data.train, binarized, seed), steps), 1):
        for run, model, optimizer in turns:
            start = time.process_time()
            train_step(model, optimizer, *batch)
            run.seconds.append(time.process_time() - start)
        turns = turns[1:] + turns[:1]  # whoever comes first finds the caches cold
        if step % every == 0:
            for run, model, _ in turns:
                run.steps.append(step)
                run.accuracy.append(percent_right(model, *test))
    return runs
