"""How long a training step of a residual block takes: torch's batch norm, and fused by bn_ext."""

from __future__ import annotations

import copy
import statistics
import time
from typing import NamedTuple

import stacks
import torch
from torch import nn

import bn_ext

SHAPE = (8, 64, 56, 56)  # of the first stage of ResNet-18
ROUNDS = 30


class Times(NamedTuple):
    """CPU seconds of each round."""

    torch: list[float]
    bn_ext: list[float]

    @property
    def times_as_fast(self) -> float:
        return statistics.median(self.torch) / statistics.median(self.bn_ext)

    @property
    def middle_half(self) -> tuple[float, float]:
        """Between these lie half of the rounds' ratios."""
        ratios = [theirs / ours for theirs, ours in zip(self.torch, self.bn_ext)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


def block_times(convolutions: bool) -> Times:
    """Forward and backward in turn, after one round that is not counted."""
    torch.manual_seed(0)
    theirs = stacks.ResidualBlock(SHAPE[1], convolutions)
    ours = bn_ext.fuse(copy.deepcopy(theirs))
    x = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    times = Times([], [])
    turns: list[tuple[list[float], nn.Module]] = [(times.torch, theirs), (times.bn_ext, ours)]
    for _ in range(ROUNDS + 1):
        for seconds, block in turns:
            inputs = [x, *block.parameters()]
            start = time.process_time()
            torch.autograd.grad(block(x), inputs, dy)
            seconds.append(time.process_time() - start)
        turns.reverse()
    return Times(*(seconds[1:] for seconds in times))
