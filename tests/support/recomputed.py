"""Models that make outputs again, and what a step of them gives and keeps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
from bn_ext.tools.profiling import allocated
from bn_ext.train import recompute_outputs


class Net(nn.Module):
    """Two convolutions and batch norms, a residual, an excitation, pooling and a concatenation.

    Of ``ours``: the activations are part of the batch norms.
    """

    def __init__(self, activation: str = "relu", ours: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.gate, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(12, 4, 1)
        norms = (bn_ext.BatchNormAct2d(6, activation=activation) if ours else nn.BatchNorm2d(6) for _ in range(2))
        self.bn1, self.bn2 = norms
        self.drop, self.activation = nn.Dropout(0.3), None if ours else getattr(F, activation)
        self.within: Callable[..., Tensor] = lambda call, x: call(x)

    def middle(self, x: Tensor) -> Tensor:
        y = self.second(x)
        return self.bn2(y, x) if self.activation is None else self.activation(self.bn2(y) + x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.first(x))
        x = x if self.activation is None else self.activation(x)
        y = self.within(self.middle, x)
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return self.last(self.drop(torch.cat([F.max_pool2d(x, 2), F.max_pool2d(y, 2)], 1)))


def fused(**options) -> nn.Module:
    return bn_ext.fuse(Net(**options))


def written(**options) -> nn.Module:
    """Without a graph: calls as someone writes them."""
    return Net(ours=True, **options)


every_way = pytest.mark.parametrize("make", [fused, written])


def example(size: int = 8, **options) -> Tensor:
    return torch.randn(4, 3, size, size, **options)


def pair(make: Callable[..., nn.Module], **options) -> tuple[nn.Module, nn.Module]:
    """A model that keeps its outputs, and one that makes them again."""
    models = make(**options), recompute_outputs(make(**options))
    models[1].load_state_dict(models[0].state_dict())
    return models


def step(
    model: nn.Module, *inputs: Tensor, around: Callable = nullcontext, call: Callable | None = None
) -> list[Tensor]:
    """Gradients and buffers after a loss over all inputs."""
    torch.manual_seed(1)
    model.zero_grad()
    with around():
        outputs = [(model if call is None else call)(x) for x in inputs]
    sum(output.float().square().sum() for output in outputs).backward()
    return [*(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(ones: list[Tensor], others: list[Tensor]) -> None:
    assert [torch.equal(one, other) for one, other in zip(ones, others, strict=True)].count(False) == 0


def kept(model: nn.Module, *inputs: Tensor, around: Callable = nullcontext) -> int:
    """Bytes between forward and backward."""

    def forward() -> list[Tensor]:
        with around():
            return [model(x) for x in inputs]

    step(model, *inputs, around=around)
    return allocated(forward, str(inputs[0].device))[0]
