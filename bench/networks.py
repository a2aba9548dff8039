"""Residual networks as they are usually written.

Source: He et al. 2015 (arXiv 1512.03385), table 1; the stride of a bottleneck is in its 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

KERNELS = {18: (3, 3), 50: (1, 3, 1)}  # of a block
WIDENED = {18: 1, 50: 4}  # by a block's last convolution
BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def _normalized(inside: int, outside: int, kernel: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outside)]


class Residual(nn.Module):
    """Convolutions of ``kernels`` between these ``channels``, and the branch around them."""

    def __init__(self, channels: Sequence[int], kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (ends, kernel) in enumerate(zip(pairwise(channels), kernels, strict=True)):
            layers += _normalized(*ends, kernel, stride if number == kernels.index(3) else 1)
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers[:-1])
        # Nearly zero at first, as is usual. Otherwise rounding to bfloat16 alone could reverse gradients.
        nn.init.constant_(layers[-2].weight, 0.1)  # type: ignore[arg-type]
        around = stride == 1 and channels[0] == channels[-1]
        self.shortcut = nn.Sequential(*([] if around else _normalized(channels[0], channels[-1], 1, stride)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        output = self.layers(input)
        output += self.shortcut(input)
        return self.relu(output)


def resnet(depth: int, classes: int = 1000, width: int = 64) -> nn.Sequential:
    """ResNet-18 or ResNet-50."""
    kernels = KERNELS[depth]
    stem = [*_normalized(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks, inside = [], width
    for stage, count in enumerate(BLOCKS[depth]):
        inner = width << stage
        outside = inner * WIDENED[depth]
        for number in range(count):
            channels = [inside, *[inner] * (len(kernels) - 1), outside]
            blocks.append(Residual(channels, kernels, 2 if stage and not number else 1))
            inside = outside
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, classes))
