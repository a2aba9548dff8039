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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# The least a pass must move, in reads and writes of the whole tensor. A copy moves two.
LEAST_MOVES = {"forward": 2, "backward": 3, "both": 5, "inference": 2}
PASSES = tuple(LEAST_MOVES)

MOMENTUM = 0.1
EPS = 1e-5


def layouts(shape: str) -> tuple[str, ...]:
    """The layouts that a shape comes in: (N, C) has but one."""
    return tuple(LAYOUTS) if shape.count("x") == 3 else ("contiguous",)


class Problem:
    """Input, gradient, parameters and statistics of one shape, layout and dtype.

    The parameters and statistics are float32 for a bfloat16 input too, as under autocast.
    """

    def __init__(self, shape: str, layout: str, dtype: str) -> None:
        self.shape, self.layout, self.dtype = shape, layout, dtype
        sizes = [int(n) for n in shape.split("x")]
        channels = sizes[1]
        random = torch.Generator().manual_seed(0)

        def tensor() -> Tensor:
            values = torch.randn(sizes, generator=random).to(DTYPES[dtype])
            return values.to(memory_format=LAYOUTS[layout]) if len(sizes) == 4 else values

        self.input = tensor().mul_(1.5).add_(0.5)
        self.dy = tensor()
        self.weight = torch.rand(channels, generator=random) + 0.5
        self.bias = torch.randn(channels, generator=random)
        self.running_mean = torch.randn(channels, generator=random)
        self.running_var = torch.rand(channels, generator=random) + 0.5

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
