"""Statistics of a batch that is spread over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_ext.nn.composed import Rule, rows_of_mask
from bn_ext.nn.ranks import Ranks
from bn_ext.stages import Moments, Statistics, Sums

_ORDER = "its processes came with other layers than this one: they have to call the same layers in the same order"


class Merged(NamedTuple):
    """The moments of all processes' values."""

    counts: Tensor
    mean: Tensor
    m2: Tensor
    values: Tensor  # how many values that count alike have means that vary as these do
    share: Tensor  # how much more a value of this process counts than its mask says


@dataclass(frozen=True)
class Spread(Rule):
    """The values of all processes share statistics. One collective each way."""

    ranks: Ranks
    layer: str  # for errors
    key: int  # the layer, as a number
    by_ranks: bool  # whether each process counts alike; otherwise each value does
    eps: float
    mask: Tensor | None

    def merged(self, moments: Moments) -> Any:
        counts, mean, m2 = moments
        squares = counts if self.mask is None else self.mask.double().square().sum()
        packed = torch.cat([self._key(mean), counts.view(1), squares.view(1), mean, m2])
        rows = self.ranks.gathered(packed, self.layer)
        torch._assert_async((rows[:, 0] == self.key).all(), f"bn_ext: {self.layer}: {_ORDER}")
        counts, squares, (means, m2s) = rows[:, 1], rows[:, 2], rows[:, 3:].tensor_split(2, 1)
        if self.by_ranks:
            some = counts > 0
            shares = torch.where(some, counts.sum() / some.sum() / torch.where(some, counts, 1), 1)
            counts, squares, m2s = counts * shares, squares * shares.square(), m2s * shares.unsqueeze(1)
            share = shares[self.ranks.mine]
        else:
            share = torch.ones_like(counts[0])
        all_squares = squares.sum()
        merged = Moments(counts.contiguous(), means.contiguous(), m2s.contiguous()).merged()
        values = merged.counts.square() / torch.where(all_squares > 0, all_squares, 1)
        return Merged(*merged, values, share)

    def statistics(self, merged: Any) -> Statistics:
        counts, mean, m2, _, share = merged
        _, mean, invstd = Moments(counts, mean, m2).each(self.eps)
        return Statistics(counts / share, mean, invstd)

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        total = self.ranks.summed(torch.cat([self._key(sums.dz), *sums]), self.layer)
        torch._assert_async(total[0] == self.key * self.ranks.number, f"bn_ext: {self.layer}, backward: {_ORDER}")
        return Sums(*(part.contiguous() for part in total[1:].chunk(2))), weight

    def _key(self, like: Tensor) -> Tensor:
        return torch.full((1,), self.key, dtype=like.dtype, device=like.device)

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.ones_like(x[:, :1]) if self.mask is None else rows_of_mask(self.mask, x)
        count = weights.sum(dtype=torch.float64)
        weights = weights / torch.where(count > 0, count, 1) if self.by_ranks else weights
        count = weights.sum(dtype=torch.float64).view(1)

        def summed(t: Tensor) -> Tensor:
            return _Summed.apply(t, self.ranks, self.layer)

        total = summed(torch.cat([count, (x * weights).sum((0, 2), dtype=torch.float64)]))
        count = torch.where(total[:1] > 0, total[:1], 1)
        mean = (total[1:] / count).unsqueeze(-1).to(x.dtype)
        var = summed(((x - mean).square() * weights).sum((0, 2), dtype=torch.float64)) / count
        return mean, var.unsqueeze(-1).to(x.dtype)


class _Summed(torch.autograd.Function):
    """The sum over processes. Its gradient, too, is the sum: of the losses of all processes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: Ranks, layer: str) -> Tensor:
        ctx.ranks, ctx.layer = ranks, layer
        return ranks.summed(t, layer)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Summed.apply(gradient.contiguous(), ctx.ranks, ctx.layer), None, None
