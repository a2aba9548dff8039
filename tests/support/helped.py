"""A small model with batch norms of several kinds, and the ways in which it is called, for the helpers of training."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext


class Several(nn.Module):
    """Torch's, ours, ours with an activation, one with a cumulative average, and calls of functions."""

    def __init__(self, functions: bool = True) -> None:
        super().__init__()
        self.conv, self.theirs = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.ours = nn.Dropout(0.5), bn_ext.BatchNorm2d(4, momentum=None)
        self.activated = bn_ext.BatchNormAct2d(4, momentum=0.3)
        self.functions = functions
        if functions:
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.theirs(self.conv(x)).relu()
        x = self.activated(self.ours(self.drop(x), x))
        if self.functions:
            x = F.batch_norm(x, self.mean, self.var, training=self.training)
            x = bn_ext.functional.batch_norm(x, self.mean, running_var=self.var, training=self.training)
        return x


# How a model becomes what is called.
WAYS: dict[str, Callable[[nn.Module], Callable]] = {
    "plain": lambda model: model,
    "converted": bn_ext.convert,
    "fused": bn_ext.fuse,
    "compiled": lambda model: torch.compile(model, backend="eager", fullgraph=True),
}


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 7, 7) + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert list(mine) == list(theirs)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
