"""The networks of the demo: stacks of sigmoids, and a residual block."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from mnist import CLASSES, SIDE
from torch import Tensor, nn

import bn_ext

NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "none": None,
    "torch": nn.BatchNorm1d,
    "bn_ext": bn_ext.BatchNorm1d,
}
WIDTH = 100


def sigmoids(depth: int, norm: str, seed: int) -> nn.Sequential:
    """``depth`` hidden layers of 100 sigmoids; the batch normalization paper (section 4.1) has three.

    Every norm starts from the same weights. Their deviation of 0.1 keeps the variance of 100 inputs, and of a digit,
    which has about 100 white pixels.
    """
    make = NORMS[norm]
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise([SIDE * SIDE, *depth * [WIDTH]]):
        layers += [nn.Linear(inputs, outputs, bias=make is None), *([make(outputs)] if make else []), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


class ResidualBlock(nn.Module):
    """ResNet's; without convolutions what is left is what ``bn_ext.fuse`` changes."""

    def __init__(self, channels: int, convolutions: bool = True) -> None:
        super().__init__()

        def convolution() -> nn.Module:
            return nn.Conv2d(channels, channels, 3, padding=1, bias=False) if convolutions else nn.Identity()

        self.conv1, self.norm1 = convolution(), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = convolution(), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + x)


def residual_network(seed: int, colors: int = 1, side: int = SIDE, classes: int = CLASSES) -> nn.Sequential:
    """A residual block between a convolution and a linear layer, for images of (colors, side, side)."""
    torch.manual_seed(seed)
    channels, features = 8, ((side + 1) // 2) ** 2
    first = nn.Conv2d(colors, channels, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(first, ResidualBlock(channels), nn.Flatten(), nn.Linear(channels * features, classes))
