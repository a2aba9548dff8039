"""The bench measures these patterns, shapes and passes; one workload has its tensors and the results to expect."""

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

# The least a pass must move, in reads and writes of the whole tensor; the mask of a ReLU after an addition or in a
# frozen layer, one bit per element, is not counted. A copy moves two. "frozen" is the backward of a layer whose
# statistics and parameters are constants.
_ONE_INPUT = {"forward": 2, "backward": 3, "both": 5, "inference": 2, "frozen": 2}
LEAST_MOVES = {
    "bn": _ONE_INPUT,
    "bn+relu": _ONE_INPUT,
    "bn+add+relu": {"forward": 3, "backward": 4, "both": 7, "inference": 3, "frozen": 3},
}
PATTERNS = tuple(LEAST_MOVES)
PASSES = tuple(_ONE_INPUT)

MOMENTUM = 0.1
EPS = 1e-5


def sizes_of(shape: str) -> list[int]:
    return [int(n) for n in shape.split("x")]


def layouts(shape: str) -> tuple[str, ...]:
    """The layouts that a shape comes in: (N, C) has but one."""
    return tuple(LAYOUTS) if shape.count("x") == 3 else ("contiguous",)


class Workload:
    """Inputs (the second, if there is one, is the residual), gradient, parameters and statistics of one shape, layout,
    dtype and pattern; ``others`` has more such inputs and gradients, ``sets`` in all, for calls that are not to find
    their tensors in a cache.

    The parameters and statistics are float32 for a half-precision input too, as under autocast.
    """

    def __init__(
        self, shape: str, layout: str, dtype: str, pattern: str = "bn", device: str = "cpu", sets: int = 1
    ) -> None:
        self.shape, self.layout, self.dtype, self.pattern = shape, layout, dtype, pattern
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

        def inputs() -> tuple[Tensor, ...]:
            input = tensor().mul_(1.5).add_(0.5)
            return (input, tensor()) if "add" in pattern else (input,)

        self.inputs, self.dy = inputs(), tensor()
        self.input = self.inputs[0]
        self.weight, self.bias = uniform(), normal()
        self.running_mean, self.running_var = normal(), uniform()
        self.others = [(inputs(), tensor()) for _ in range(sets - 1)]
        if self.relu:
            # Next to zero, rounding decides on the branch of ReLU: no gradient shall depend on it.
            for norm in (reference.statistics(self.input), (self.running_mean, self.running_var)):
                before = self._before_relu(*norm)
                self.dy[before.abs() < 4 * torch.finfo(self.dy.dtype).eps * before.abs().max()] = 0

    @property
    def relu(self) -> bool:
        return "relu" in self.pattern

    def _before_relu(self, mean: Tensor, var: Tensor) -> Tensor:
        output = reference.forward(self.input, self.weight, self.bias, mean, var, EPS)
        return sum(self.inputs[1:], output)

    @cached_property
    def expected(self) -> dict[str, dict[str, Tensor]]:
        """The results of each pass in float64, by name."""
        x = self.input
        mean, var = reference.statistics(x)
        before, inferred = (self._before_relu(*s) for s in ((mean, var), (self.running_mean, self.running_var)))
        dy, frozen_dy = (self.dy * (z > 0) if self.relu else self.dy for z in (before, inferred))
        dx, dweight, dbias = reference.backward(dy, x, self.weight, mean, var, EPS, training=True)
        running = self.running_mean, self.running_var
        frozen_dx, *_ = reference.backward(frozen_dy, x, self.weight, *running, EPS, training=False)
        forward = {
            "output": before.relu() if self.relu else before,
            "running_mean": reference.running(self.running_mean, mean, MOMENTUM),
            "running_var": reference.running(self.running_var, reference.unbiased(x, var), MOMENTUM),
        }

        def of_inputs(*gradients: Tensor) -> dict[str, Tensor]:
            return dict(zip(("dx", "dresidual")[: len(self.inputs)], gradients, strict=False))

        gradients = {**of_inputs(dx, dy), "dweight": dweight, "dbias": dbias}
        frozen = of_inputs(frozen_dx, frozen_dy)
        inference = {"output": inferred.relu() if self.relu else inferred}
        return {
            "forward": forward,
            "backward": gradients,
            "both": gradients,
            "inference": inference,
            "frozen": frozen,
        }
