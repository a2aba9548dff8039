"""Small networks of well-known architectures, written as in the usual code bases, to try whole models on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


# ---------------------------------------------------------------------------------------------- ResNet


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(conv(inputs, width, 1, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module], depths: Iterable[int], width: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.stages, inputs = nn.Sequential(), width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                self.stages.append(block(inputs, width << stage, 2 if stage and not i else 1))
                inputs = (width << stage) * block.expansion
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.stages(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Module:
    return ResNet(BasicBlock, (2, 2, 2, 2), width, classes)


# ---------------------------------------------------------------------------------------------- ResNet, pre-activation


class PreActBottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, width, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), conv(width, 4 * width, 1)
        self.shortcut = conv(inputs, 4 * width, 1, stride) if stride != 1 or inputs != 4 * width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        out += shortcut
        return out


def preact_resnet(width: int = 4, classes: int = 5) -> nn.Module:
    blocks = [PreActBottleneck(width, width, 2), PreActBottleneck(4 * width, width, 1)]
    head = [nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(conv(3, width), *blocks, *head, nn.Linear(4 * width, classes))


# ---------------------------------------------------------------------------------------------- MobileNet, EfficientNet


class ConvNormActivation(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int, groups: int, activation: type[nn.Module] | None
    ) -> None:
        layers = [conv(inputs, outputs, kernel, stride, groups), nn.BatchNorm2d(outputs)]
        super().__init__(*layers, *([activation(inplace=True)] if activation else []))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.silu(self.fc1(F.adaptive_avg_pool2d(x, 1)), inplace=True)
        return self.fc2(scale).sigmoid() * x


class InvertedResidual(nn.Module):
    """Of MobileNetV2; with an excitation, EfficientNet's MBConv."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, expand: int, activation: type[nn.Module], excite: bool = False
    ) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [ConvNormActivation(inputs, hidden, 1, 1, 1, activation)] if expand != 1 else []
        layers += [ConvNormActivation(hidden, hidden, 3, stride, hidden, activation)]
        layers += [SqueezeExcitation(hidden)] if excite else []
        layers += [ConvNormActivation(hidden, outputs, 1, 1, 1, None)]
        self.conv = nn.Sequential(*layers)
        self.use_res_connect = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


def _inverted_residuals(width: int, classes: int, activation: type[nn.Module], excite: bool) -> nn.Module:
    plan = [(width, 2 * width, 2, 1), (2 * width, 2 * width, 1, 4)]  # inputs to expansion
    return nn.Sequential(
        ConvNormActivation(3, width, 3, 2, 1, activation),
        *[InvertedResidual(*sizes, activation, excite) for sizes in plan],
        ConvNormActivation(2 * width, 8 * width, 1, 1, 1, activation),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes),
    )


def mobilenet_v2(width: int = 4, classes: int = 5) -> nn.Module:
    return _inverted_residuals(width, classes, nn.ReLU6, excite=False)


def efficientnet(width: int = 4, classes: int = 5) -> nn.Module:
    return _inverted_residuals(width, classes, nn.SiLU, excite=True)


# ---------------------------------------------------------------------------------------------- DenseNet


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = conv(inputs, 4 * growth, 1)
        self.norm2, self.relu2 = nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = conv(4 * growth, growth)

    def forward(self, features: list[Tensor]) -> Tensor:
        bottleneck = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(bottleneck)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__({f"layer{i}": DenseLayer(inputs + i * growth, growth) for i in range(layers)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


def densenet(growth: int = 4, classes: int = 5) -> nn.Module:
    width = 2 * growth
    stem = [conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    transition = [nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True), conv(4 * growth, width, 1), nn.AvgPool2d(2)]
    head = [nn.BatchNorm2d(3 * growth), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    blocks = [DenseBlock(2, width, growth), *transition, DenseBlock(1, width, growth)]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(3 * growth, classes))


# ---------------------------------------------------------------------------------------------- U-Net, in 3-D


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        layers = []
        for channels in (inputs, outputs):
            layers += [nn.Conv3d(channels, outputs, 3, padding=1), nn.BatchNorm3d(outputs), nn.LeakyReLU(inplace=True)]
        super().__init__(*layers)


class UNet3d(nn.Module):
    def __init__(self, width: int = 4, levels: int = 1) -> None:
        super().__init__()
        sizes = [width << level for level in range(levels + 1)]
        self.stem = DoubleConv(1, width)
        self.downs = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(sizes))
        self.ups = nn.ModuleList(nn.ConvTranspose3d(b, a, 2, 2) for a, b in pairwise(sizes))
        self.decoders = nn.ModuleList(DoubleConv(2 * a, a) for a in sizes[:-1])
        self.head = nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(F.max_pool3d(x, 2))
        for up, decoder, skip in zip(reversed(self.ups), reversed(self.decoders), reversed(skips)):
            x = decoder(torch.cat([skip, up(x)], 1))
        return self.head(x)


# ---------------------------------------------------------------------------------------------- all of them

# Of few blocks, a kind each: what a compiler takes for a network grows with their number.


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one example

    def input(self, batch: int = 4, **options) -> Tensor:
        return torch.randn(batch, *self.shape, **options)


NETWORKS = {
    "resnet18": Network(lambda: ResNet(BasicBlock, (2, 1), 4, classes=5), (3, 32, 32)),
    "resnet50": Network(lambda: ResNet(Bottleneck, (1, 1), 4, classes=5), (3, 32, 32)),
    "preact_resnet": Network(preact_resnet, (3, 12, 12)),
    "mobilenet_v2": Network(mobilenet_v2, (3, 16, 16)),
    "efficientnet": Network(efficientnet, (3, 16, 16)),
    "densenet": Network(densenet, (3, 32, 32)),
    "unet3d": Network(UNet3d, (1, 8, 8, 8)),
}


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, input: Tensor) -> dict[str, Tensor]:
    """One of training, and everything that it gives, by name."""
    optimizer.zero_grad()
    output = model(input.clone())
    # Weighted, as the plain mean of what a batch norm gives has no gradient.
    output.mul(torch.linspace(-1, 1, output.numel()).to(output).view_as(output)).mean().backward()
    optimizer.step()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), **gradients, **model.state_dict()}


def assert_same_training(mine: nn.Module, theirs: nn.Module, inputs: Iterable[Tensor], tolerance: float = 1e-9) -> None:
    """Both train alike, one step of SGD an input: outputs, gradients, parameters and statistics."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (mine, theirs)]
    for i, input in enumerate(inputs):
        one, other = (_step(m, o, input) for m, o in zip((mine, theirs), optimizers, strict=True))
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=f"step {i}: {{}}".format)
