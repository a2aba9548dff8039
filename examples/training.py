"""Two small networks, each without batch norm, with torch's and with bn_ext's, trained side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from mnist import CLASSES, SIDE, Data, Digits
from torch import Tensor, nn

import bn_ext

BATCH = 60
PERCENTILES = (0.15, 0.50, 0.85)

Norm = Callable[[int], nn.Module] | None


@dataclass(frozen=True)
class Experiment:
    """A network and how it is trained; a rate with batch norm serves torch's and ours."""

    name: str
    build: Callable[[Norm], nn.Sequential]
    prepare: Callable[[Tensor], Tensor]  # images as bytes -> the network's input
    norms: dict[str, Norm]
    rate_plain: float
    rate_norm: float
    steps: int

    def model(self, variant: str, seed: int) -> nn.Sequential:
        """The same weights for every variant: a batch norm draws no random numbers, a bias starts at zero."""
        torch.manual_seed(seed)
        return self.build(self.norms[variant])

    def optimizer(self, variant: str, model: nn.Module) -> torch.optim.Optimizer:
        rate = self.rate_plain if self.norms[variant] is None else self.rate_norm
        return torch.optim.SGD(model.parameters(), lr=rate)


def sigmoid_network(norm: Norm) -> nn.Sequential:
    """The paper's network (section 4.1): three layers of 100 sigmoids, small Gaussian weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (SIDE * SIDE, 100, 100):
        layers += [nn.Linear(inputs, 100, bias=norm is None), *([norm(100)] if norm else []), nn.Sigmoid()]
    return _gaussian(nn.Sequential(*layers, nn.Linear(100, CLASSES)), "sigmoid")


def convolutional_network(norm: Norm) -> nn.Sequential:
    """Three convolutions, the last two of stride 2, and one linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2), (16, 32, 2)):
        convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=norm is None)
        layers += [convolution, *([norm(outputs)] if norm else []), nn.ReLU()]
    return _gaussian(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, CLASSES)), "relu")


def _gaussian(model: nn.Sequential, nonlinearity: str) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)  # type: ignore[arg-type]
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return model


def binarized(images: Tensor) -> Tensor:
    return (images >= 128).to(torch.get_default_dtype())


def grey(images: Tensor) -> Tensor:
    return images.unsqueeze(1) / 255


EXPERIMENTS = (
    Experiment(
        name="sigmoids",
        build=sigmoid_network,
        prepare=binarized,
        norms={"none": None, "torch": nn.BatchNorm1d, "bn_ext": bn_ext.BatchNorm1d},
        rate_plain=1.0,
        rate_norm=0.5,
        steps=8000,
    ),
    Experiment(
        name="convolutions",
        build=convolutional_network,
        prepare=grey,
        norms={"none": None, "torch": nn.BatchNorm2d, "bn_ext": bn_ext.BatchNorm2d},
        rate_plain=0.1,
        rate_norm=0.1,
        steps=1500,
    ),
)


@dataclass
class Run:
    """What one variant's training showed."""

    variant: str
    seconds: list[float] = field(default_factory=list)  # of each training step
    steps: list[int] = field(default_factory=list)  # done when the following were measured
    accuracy: list[float] = field(default_factory=list)
    percentiles: list[Tensor] = field(default_factory=list)  # (3, 100): of the last sigmoids' inputs, if there are any


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
def evaluate(model: nn.Sequential, images: Tensor, labels: Tensor, step: int, run: Run) -> None:
    model.eval()
    before = model[:-2](images)
    if isinstance(model[-2], nn.Sigmoid):
        run.percentiles.append(before.quantile(before.new_tensor(PERCENTILES), dim=0))
    run.steps.append(step)
    run.accuracy.append((model[-2:](before).argmax(1) == labels).float().mean().item())
    model.train()


def train(
    experiment: Experiment, data: Data, steps: int, seed: int, evaluations: int, tick: Callable[[int], None]
) -> list[Run]:
    """Every variant from the same weights on the same batches, a step each in turn, so that all are timed alike."""
    runs = [Run(variant) for variant in experiment.norms]
    models = [experiment.model(run.variant, seed) for run in runs]
    optimizers = [experiment.optimizer(run.variant, model) for run, model in zip(runs, models)]
    turns = list(zip(runs, models, optimizers))
    test = experiment.prepare(data.test.images), data.test.labels
    every = max(1, steps // evaluations)
    for step, batch in enumerate(islice(batches(data.train, experiment.prepare, seed), steps)):
        if step % every == 0:
            for run, model, _ in turns:
                evaluate(model, *test, step, run)
        for run, model, optimizer in turns:
            start = time.perf_counter()
            train_step(model, optimizer, *batch)
            run.seconds.append(time.perf_counter() - start)
        turns = turns[1:] + turns[:1]  # no variant always follows the same other
        tick(step + 1)
    for run, model, _ in turns:
        evaluate(model, *test, steps, run)
    return runs


def loss_difference(experiment: Experiment, digits: Digits, steps: int, seed: int) -> float:
    """Largest relative difference between the losses of torch and bn_ext, each trained alone in float64."""

    def losses(variant: str) -> Tensor:
        model = experiment.model(variant, seed).double()
        optimizer = experiment.optimizer(variant, model)
        pairs = islice(batches(digits, experiment.prepare, seed), steps)
        return torch.stack([train_step(model, optimizer, images.double(), labels) for images, labels in pairs])

    expected, got = losses("torch"), losses("bn_ext")
    return ((got - expected).abs() / expected.abs()).max().item()
