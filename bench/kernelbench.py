"""Problem 33 of KernelBench's level 1: batch norm of 64x64x512x512 values in training mode, forward alone.

The inputs have mean 5 and deviation 3, so that a variance from E[x^2] - E[x]^2 would show; the running statistics are
compared as the output is.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bench.workloads import EPS, MOMENTUM, Workload
from bn_ext import reference

NAME = "KernelBench 1/33"
SHAPE = "64x64x512x512"
LAYOUT, DTYPE, PASS = "contiguous", "float32", "forward"


class Problem33(Workload):
    """A new module's parameters and statistics. Of the results only those of the forward, in float64, which together
    with all others would need more memory than a GPU has."""

    def __init__(self, shape: str, device: str, sets: int) -> None:
        super().__init__(shape, LAYOUT, DTYPE, device=device, sets=sets)
        for (input,) in (self.inputs, *(inputs for inputs, _ in self.others)):
            input.mul_(2).add_(4)  # of mean 0.5 and deviation 1.5
        for t, value in ((self.weight, 1), (self.bias, 0), (self.running_mean, 0), (self.running_var, 1)):
            t.fill_(value)

    @cached_property
    def expected(self) -> dict[str, dict[str, Tensor]]:
        x = self.input
        with torch.no_grad():
            mean, var = (torch.cat(parts) for parts in zip(*map(reference.statistics, x.split(1, 1)), strict=True))
            results = {
                "output": reference.forward(x, self.weight, self.bias, mean, var, EPS),
                "running_mean": reference.running(self.running_mean, mean, MOMENTUM),
                "running_var": reference.running(self.running_var, reference.unbiased(x, var), MOMENTUM),
            }
        return {PASS: results}
