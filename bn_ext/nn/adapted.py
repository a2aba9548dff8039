"""Evaluation by a mixture of the running statistics and the batch's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bn_ext.nn.composed import Rule
from bn_ext.stages import Moments, Statistics, Sums


@dataclass(frozen=True)
class Mixture(Rule):
    """Running statistics with a weight of ``share``, and with the rest of 1 those of the batch."""

    running_mean: Tensor
    running_var: Tensor
    share: float
    eps: float

    def statistics(self, merged: Moments) -> Statistics:
        counts = merged.counts.clamp(min=1)
        mean = merged.mean.lerp(self.running_mean.double(), self.share)
        var = (merged.m2 / counts).lerp(self.running_var.double(), self.share)
        return Statistics(counts, mean, (var + self.eps).rsqrt())

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        # Mean and variance move with the input by the batch's part alone, the variance about the batch's own mean.
        apart = (statistics.mean - merged.mean) * statistics.invstd.square()
        dz = (sums.dz + apart * sums.dz_xmu) * (1 - self.share)
        return Sums(dz, sums.dz_xmu * (1 - self.share)), weight

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean((0, 2)).lerp(self.running_mean.to(x.dtype), self.share)
        var = x.var((0, 2), unbiased=False).lerp(self.running_var.to(x.dtype), self.share)
        return mean.unsqueeze(-1), var.unsqueeze(-1)
