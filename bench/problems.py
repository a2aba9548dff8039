"""What is measured: shapes, passes, and the tensors of one problem with the results to expect."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bn_ext import reference

RESNET = ("32x64x56x56", "32x256x56x56", "32x512x28x28", "32x1024x14x14", "32x2048x7x7")
SMALL = ("8x64x56x56", "2x32x8x8", "128x256")
SHAPES = RESNET + SMALL
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The least a pass must move, in reads and writes of the whole tensor. A copy moves two.
LEAST_MOVES = {"forward": 2, "backward": 3, "both": 5, "inference": 2}
PASSES = tuple(LEAST_MOVES)

MOMENTUM = 0.1
EPS = 1e-5


def sizes_of(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")]


def layouts(shape: str) -> tuple[str, ...]:
    """The layouts that a shape comes in: (N, C) has but one."""
    return tuple(LAYOUTS) if shape.count("x") == 3 else ("contiguous",)


class Problem:
    """Input, gradient, parameters and statistics of one shape, layout and dtype; ``others`` has more such inputs and
    gradients, ``sets`` in all, for calls that are not to find their tensors in a cache.

    The parameters and statistics are float32 for a half-precision input too, as under autocast.
    """

    def __init__(self, shape: str, layout: str, dtype: str, device: str = "cpu", sets: int = 1) -> None:
        self.shape, self.layout, self.dtype = shape, layout, dtype
        sizes = sizes_of(shape)
        channels = sizes[1]
        random = torch.Generator(device).manual_seed(0)

        def tensor() -> Tensor:
            values = torch.randn(sizes, generator=random, device=device, dtype=torch.float32).to(DTYPES[dtype])
            return values.to(memory_format=LAYOUTS[layout]) if len(sizes) == 4 else values

        def uniform() -> Tensor:
            return torch.rand(channels, generator=random, device=device) + 0.5

        def normal() -> Tensor:
            return torch.randn(channels, generator=random, device=device)

        self.input = tensor().mul_(1.5).add_(0.5)
        self.dy = tensor()
        self.weight, self.bias = uniform(), normal()
        self.running_mean, self.running_var = normal(), uniform()
        self.others = [(tensor().mul_(1.5).add_(0.5), tensor()) for _ in range(sets - 1)]

    @cached_property
    def expected(self) -> dict[str, dict[str, Tensor]]:
        """The results of each pass in float64, by name."""
        x, affine = self.input, (self.weight, self.bias)
        mean, var = reference.statistics(x)
        forward = {
            "output": reference.forward(x, *affine, mean, var, EPS),
            "running_mean": reference.running(self.running_mean, mean, MOMENTUM),
            "running_var": reference.running(self.running_var, reference.unbiased(x, var), MOMENTUM),
        }
        names = ("dx", "dweight", "dbias")
        gradients = dict(
            zip(names, reference.backward(self.dy, x, self.weight, mean, var, EPS, training=True), strict=True)
        )
        inference = {"output": reference.forward(x, *affine, self.running_mean, self.running_var, EPS)}
        return {"forward": forward, "backward": gradients, "both": gradients, "inference": inference}
