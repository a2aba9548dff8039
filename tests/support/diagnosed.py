"""Small models for diagnose, and what it finds in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bn_ext
from bn_ext.train import diagnose

IMAGES = torch.randn(32, 3, 8, 8)
PREPARATIONS = {"plain": lambda model: model, "converted": bn_ext.convert, "fused": bn_ext.fuse}
WAYS = {"run": IMAGES, "traced": None}
BIAS = [("0", "bias of Conv2d before batch norm")]
DROPOUT = "dropout of 0.3 before batch norm"


def conv(**options) -> nn.Conv2d:
    return nn.Conv2d(3, 3, 1, **{"bias": False, **options})


def norm(**options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(3, **options)


def frozen(module: nn.Module) -> nn.Module:
    """In evaluation, with statistics of a training."""
    module.running_mean.fill_(1)
    return module.eval()


class Calls(nn.Module):
    """Calls a function with itself, its parts and its input."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def found(model: nn.Module, *arguments, **options) -> list[tuple[str, str]]:
    return [(finding.path, finding.what) for finding in diagnose(model, *arguments, **options)]
