"""Networks beside the residual ones, with the sizes of their papers, written as is usual.

Sources: VGG 1409.1556, table 1 D; DenseNet 1608.06993, table 1; MobileNetV2 1801.04381, table 2; EfficientNet
1905.11946, table 1; U-Net 1505.04597, figure 1, with padding and batch norm. The detector has the cross-stage blocks
(CSPNet 1911.11929) and the neck of concatenations of the YOLO family, for three sizes of objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.networks import resnet

CLASSES = 1000


def normalized(
    inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1, activation: Callable | None = None
) -> nn.Sequential:
    """A convolution, a batch norm, and an activation if there is one."""
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), *([] if activation is None else [activation()]))


relu, relu6, silu = (partial(one, inplace=True) for one in (nn.ReLU, nn.ReLU6, nn.SiLU))


def _head(channels: int, dropout: float = 0.2) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, CLASSES)]


# ---------------------------------------------------------------------------------------------- VGG


def vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    inside = 3
    for outside, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
            inside = outside
        layers.append(nn.MaxPool2d(2))
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    for before, after in pairwise((512 * 49, 4096, 4096)):
        head += [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*layers, *head, nn.Linear(4096, CLASSES))


# ---------------------------------------------------------------------------------------------- DenseNet


class _DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inside),
            nn.ReLU(inplace=True),
            *normalized(inside, 4 * growth, 1, activation=relu),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers(torch.cat(features, 1))


class _DenseBlock(nn.ModuleList):
    def forward(self, input: Tensor) -> Tensor:
        features = [input]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet121(growth: int = 32) -> nn.Sequential:
    width = 2 * growth
    layers: list[nn.Module] = [*normalized(3, width, 7, 2, activation=relu), nn.MaxPool2d(3, 2, 1)]
    counts = (6, 12, 24, 16)
    for number, count in enumerate(counts):
        layers.append(_DenseBlock(_DenseLayer(width + i * growth, growth) for i in range(count)))
        width += count * growth
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        if number < len(counts) - 1:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, *_head(width, dropout=0))


# ---------------------------------------------------------------------------------------------- MobileNet, EfficientNet


class _Excitation(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.SiLU(inplace=True),
            nn.Conv2d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.gate(input) * input


class _Inverted(nn.Module):
    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int, expand: int, activation: Callable, excites: bool
    ) -> None:
        super().__init__()
        hidden = inside * expand
        self.layers = nn.Sequential(
            *(normalized(inside, hidden, 1, activation=activation) if expand > 1 else []),
            *normalized(hidden, hidden, kernel, stride, hidden, activation),
            *([_Excitation(hidden, inside // 4)] if excites else []),
            *normalized(hidden, outside, 1),
        )
        self.is_residual = stride == 1 and inside == outside

    def forward(self, input: Tensor) -> Tensor:
        output = self.layers(input)
        return input + output if self.is_residual else output


# Channels, blocks, stride of the first, expansion, kernel.
_MOBILENET = (
    (16, 1, 1, 1, 3),
    (24, 2, 2, 6, 3),
    (32, 3, 2, 6, 3),
    (64, 4, 2, 6, 3),
    (96, 3, 1, 6, 3),
    (160, 3, 2, 6, 3),
)
_EFFICIENTNET = ((16, 1, 1, 1, 3), (24, 2, 2, 6, 3), (40, 2, 2, 6, 5), (80, 3, 2, 6, 3), (112, 3, 1, 6, 5))
_EFFICIENTNET += ((192, 4, 2, 6, 5),)  # type: ignore[assignment]


def _inverted(stages: Sequence[tuple[int, ...]], activation: Callable, excites: bool) -> nn.Sequential:
    layers: list[nn.Module] = [normalized(3, 32, 3, 2, activation=activation)]
    inside = 32
    for outside, count, stride, expand, kernel in stages:
        for number in range(count):
            step = 1 if number else stride
            layers.append(_Inverted(inside, outside, kernel, step, expand, activation, excites))
            inside = outside
    return nn.Sequential(*layers, normalized(inside, 1280, 1, activation=activation), *_head(1280))


def mobilenet_v2() -> nn.Sequential:
    return _inverted((*_MOBILENET, (320, 1, 1, 6, 3)), relu6, excites=False)


def efficientnet_b0() -> nn.Sequential:
    return _inverted((*_EFFICIENTNET, (320, 1, 1, 6, 3)), silu, excites=True)


# ---------------------------------------------------------------------------------------------- U-Net


class UNet(nn.Module):
    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()
        sizes = [width << level for level in range(levels + 1)]
        self.encoders = nn.ModuleList(self.twice(a, b) for a, b in pairwise([3, *sizes]))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(sizes))
        self.decoders = nn.ModuleList(self.twice(2 * a, a) for a in sizes[:-1])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def twice(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            *normalized(inside, outside, 3, activation=relu), *normalized(outside, outside, 3, 1, 1, relu)
        )

    def forward(self, input: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for encoder in self.encoders:
            input = encoder(F.max_pool2d(input, 2) if skips else input)
            skips.append(input)
        input = skips.pop()
        for up, decoder, skip in zip(reversed(self.ups), reversed(self.decoders), reversed(skips), strict=True):
            input = decoder(torch.cat([skip, up(input)], 1))
        return self.head(input).mean((2, 3))


# ---------------------------------------------------------------------------------------------- a detector


class _Stage(nn.Module):
    """Half of the channels pass residual blocks; all parts are concatenated."""

    def __init__(self, inside: int, outside: int, blocks: int, adds: bool) -> None:
        super().__init__()
        inner = outside // 2
        self.first = normalized(inside, outside, 1, activation=silu)
        self.blocks = nn.ModuleList(
            nn.Sequential(normalized(inner, inner, 3, activation=silu), normalized(inner, inner, 3, activation=silu))
            for _ in range(blocks)
        )
        self.last = normalized((2 + blocks) * inner, outside, 1, activation=silu)
        self.adds = adds

    def forward(self, input: Tensor) -> Tensor:
        parts = [*self.first(input).chunk(2, 1)]
        for block in self.blocks:
            output = block(parts[-1])
            parts.append(parts[-1] + output if self.adds else output)
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [width << level for level in range(5)]
        self.stem = normalized(3, width, 3, 2, activation=silu)
        self.downs = nn.ModuleList(normalized(a, b, 3, 2, activation=silu) for a, b in pairwise(sizes))
        self.stages = nn.ModuleList(_Stage(b, b, n, adds=True) for b, n in zip(sizes[1:], (1, 2, 2, 1), strict=True))
        *_, small, middle, large = sizes
        self.up_middle = _Stage(large + middle, middle, 1, adds=False)
        self.up_small = _Stage(middle + small, small, 1, adds=False)
        self.down_small = normalized(small, small, 3, 2, activation=silu)
        self.down_middle = _Stage(small + middle, middle, 1, adds=False)
        self.heads = nn.ModuleList(
            nn.Sequential(normalized(a, 64, 3, activation=silu), nn.Conv2d(64, 85, 1)) for a in (small, middle)
        )

    def forward(self, input: Tensor) -> Tensor:
        input, found = self.stem(input), []
        for down, stage in zip(self.downs, self.stages, strict=True):
            input = stage(down(input))
            found.append(input)
        *_, small, middle, large = found
        middle = self.up_middle(torch.cat([F.interpolate(large, scale_factor=2), middle], 1))
        small = self.up_small(torch.cat([F.interpolate(middle, scale_factor=2), small], 1))
        middle = self.down_middle(torch.cat([self.down_small(small), middle], 1))
        return sum(head(one).mean((2, 3)) for head, one in zip(self.heads, (small, middle), strict=True))


# By name: a network, and the batch that it is measured with.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MobileNetV2": (mobilenet_v2, 8),
    "EfficientNet-B0": (efficientnet_b0, 8),
    "DenseNet-121": (densenet121, 4),
    "VGG-16": (vgg16, 4),
    "ResNet-18": (partial(resnet, 18), 8),
    "ResNet-50": (partial(resnet, 50), 8),
    "U-Net": (UNet, 2),
    "detector": (Detector, 4),
}
