"""Models to fuse, and what they have to agree in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same_training
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bn_ext
from bn_ext.graph import fusions


class Model(nn.Module):
    """A convolution, a batch norm of it, and whatever ``then`` makes of that (and of another convolution)."""

    def __init__(self, then: Callable = lambda m, y, r: y, bn: nn.Module | None = None, **modules) -> None:
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4) if bn is None else bn
        self.head = nn.Conv2d(4, 2, 1)
        self.then = then
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.side(x)
        return self.head(self.then(self, self.bn(self.conv(x)), residual))


def nothing() -> None: ...


class Block(nn.Module):
    def __init__(self, width: int = 3, pause: Callable = nothing) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)
        self.pause = pause

    def forward(self, x: Tensor) -> Tensor:
        self.pause()
        return F.relu(self.bn(self.conv(x)) + x)

    def method(self, x: Tensor) -> Tensor:
        return self.forward(x)


def example() -> Tensor:
    return torch.randn(2, 3, 4, 4)


class Called(nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.ModuleDict):
    """Many models of one input, in one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(model(x) for model in self.values())


def branches(models: Iterable[nn.Module]) -> nn.Module:
    return Branches({str(i): model for i, model in enumerate(models)})


def norm2(**options) -> dict[str, nn.Module]:
    return {"bn2": nn.BatchNorm2d(4, **options)}


def inputs(steps: int = 2) -> list[Tensor]:
    return [torch.randn(2, 3, 5, 5, dtype=torch.float64) for _ in range(steps)]


def fused_with(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {fusion.batch_norm: fusion.fused for fusion in fusions(model)}


def assert_same(model: nn.Module, batches: list[Tensor] | None = None, tolerance: float = 1e-10) -> nn.Module:
    """``model``, fused: after it was trained and evaluated as ``model`` was."""
    model = model.double().train()
    mine = bn_ext.fuse(copy.deepcopy(model))
    batches = batches or inputs()
    assert_same_training(mine, model, batches, tolerance)
    torch.testing.assert_close(mine.eval()(batches[0].clone()), model.eval()(batches[0].clone()))
    assert list(mine.state_dict()) == list(model.state_dict())
    return mine


def operators(call: Callable[[], object]) -> dict[str, int]:
    """How often a call, which is made once before, calls what fusing makes fewer of."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    names = [event.name for event in profiled.events()]
    watched = ("bn_ext::batch_norm", "aten::batch_norm", "aten::add", "aten::add_", "aten::relu", "aten::relu_")
    return {name: names.count(name) for name in watched if name in names}


def graphs_of(model: nn.Module, *args: Tensor) -> list[torch.fx.Graph]:
    """The graphs that a first call of a fused model runs."""
    from bn_ext.graph.fusion import fused

    graphs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "run", lambda module, inputs: [graphs.append(module.graph), module.forward][1])
        model(*args)
    return graphs
