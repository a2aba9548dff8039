"""Batch norm whose statistics are shared by groups of channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.jit import is_tracing
from torch.nn.modules.batchnorm import _NormBase

from bn_ext.nn.batch_norm import _FusedBatchNorm
from bn_ext.nn.composed import Rule, check_training
from bn_ext.stages import Moments, Statistics, Sums


@dataclass(frozen=True)
class Groups(Rule):
    """Adjacent channels share statistics."""

    groups: int
    eps: float

    def _mean(self, of_channels: Tensor) -> Tensor:
        """The mean over each group, for each channel."""
        size = of_channels.size(0) // self.groups
        return of_channels.view(self.groups, size).mean(1).repeat_interleave(size)

    def merged(self, moments: Moments) -> Moments:
        size = moments.mean.size(0) // self.groups
        mean = self._mean(moments.mean)
        between = (moments.mean - mean).square() * moments.counts
        return Moments(moments.counts * size, mean, self._mean(moments.m2 + between) * size)

    def statistics(self, merged: Moments) -> Statistics:
        return merged.each(self.eps)

    def through(
        self, sums: Sums, statistics: Statistics, merged: Moments, weight: Tensor | None
    ) -> tuple[Sums, Tensor | None]:
        size = sums.dz.size(0) // self.groups
        if weight is None:
            return Sums(self._mean(sums.dz) * size, self._mean(sums.dz_xmu) * size), None
        # The gradient is weight * (dz - sums / weight ...): next to the group's largest, none may be nothing.
        exact = weight.double()
        largest = exact.abs().view(self.groups, size).amax(1).repeat_interleave(size)
        least = largest * (2.0**-80 if weight.dtype == torch.float64 else 2.0**-40)
        scale = torch.where(exact.abs() < least, least, exact)
        divisor = torch.where(scale == 0, 1, scale)
        dz, dz_xmu = (self._mean(exact * part) * size / divisor for part in sums)
        precise = torch.promote_types(weight.dtype, torch.float32)  # half precision has no numbers so small
        return Sums(dz, dz_xmu), scale.to(precise)

    def by_primitives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self._mean(x.mean((0, 2))).unsqueeze(-1)
        return mean, self._mean((x - mean).square().mean((0, 2))).unsqueeze(-1)


class SharedBatchNorm(_FusedBatchNorm):
    """The base of the three classes of batch norm with shared statistics."""

    __constants__ = [*_FusedBatchNorm.__constants__, "stat_groups"]  # noqa: RUF012
    mixes = False
    masks = False

    def __init__(self, num_features: int, stat_groups: int, **options: Any) -> None:
        if type(stat_groups) is not int:
            raise TypeError(f"stat_groups should be an int, got {type(stat_groups).__name__}")
        if stat_groups < 1 or num_features % stat_groups:
            raise ValueError(f"num_features should be divisible by stat_groups, got {num_features} and {stat_groups}")
        super().__init__(num_features, **options)
        if not self.track_running_stats:
            raise ValueError("track_running_stats should be True: torch's evaluation without them shares no statistics")
        self.stat_groups = stat_groups

    def extra_repr(self) -> str:
        return f"{_NormBase.extra_repr(self)}, stat_groups={self.stat_groups}, bn_ext{self._changed()}"

    def _rule(self, input: Tensor, mask: Tensor | None) -> Rule | None:
        if not self.training or self.frozen:
            return None
        self._check_input_dim(input)
        check_training(input, self.num_features, self.eps)
        if not is_tracing() and input.numel() == self.stat_groups:
            size = f"torch.Size({list(input.shape)})"
            raise ValueError(f"Expected more than 1 value per group when training, got input size {size}")
        return Groups(self.stat_groups, self.eps)

    def _for_training(self, input: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None]:
        raise RuntimeError("TorchScript has no form of shared statistics: script in evaluation, or use torch.compile")


class SharedBatchNorm1d(SharedBatchNorm, torch.nn.BatchNorm1d):
    """Batch norm whose mean and variance are shared by groups of channels.

    It is :class:`SharedBatchNorm2d` for other shapes.

    Args:
        num_features, stat_groups, **options: as for :class:`SharedBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :class:`SharedBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.SharedBatchNorm1d(8, stat_groups=2)
        >>> bn(torch.randn(100, 8))[:, :4].mean().abs() < 1e-6
        tensor(True)
    """


class SharedBatchNorm2d(SharedBatchNorm, torch.nn.BatchNorm2d):
    """Batch norm whose mean and variance are shared by groups of channels.

    Each of ``stat_groups`` groups holds C / stat_groups adjacent channels, and is normalized in training by the mean
    and variance of all its values. Weight and bias stay apart for each channel, and so do the running statistics, which
    are equal within a group. In evaluation it computes what :class:`torch.nn.BatchNorm2d` does, of which it is a
    subclass, and its ``state_dict`` is that of it. The call is that of :class:`BatchNorm2d`.

    Args:
        num_features: C, the number of channels.
        stat_groups: the number of groups.
        options: by name: ``eps``, ``momentum``, ``affine``, ``device`` and ``dtype``, as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, H, W), of any strides.

    Raises:
        TypeError: a ``stat_groups`` that is no int; in a call, as :class:`BatchNorm2d`.
        ValueError: channels that cannot be divided by ``stat_groups``; no running statistics, without which torch's
            evaluation would share none; in a call, one value per group in training, or what :class:`BatchNorm2d`
            refuses.
        RuntimeError: in a call, as :class:`BatchNorm2d`; in training, by TorchScript; a second derivative with a
            residual and an activation such as relu.
        NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.SharedBatchNorm2d(8, stat_groups=2)
        >>> y = bn(torch.randn(4, 8, 5, 5))
        >>> y[:, :4].mean().abs() < 1e-6, bn.running_mean[:4].unique().numel()
        (tensor(True), 1)

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Section 3.2, where a feature map's positions share statistics; here
    a group's channels do, too.
    """


class SharedBatchNorm3d(SharedBatchNorm, torch.nn.BatchNorm3d):
    """Batch norm whose mean and variance are shared by groups of channels.

    It is :class:`SharedBatchNorm2d` for other shapes.

    Args:
        num_features, stat_groups, **options: as for :class:`SharedBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :class:`SharedBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.SharedBatchNorm3d(8, stat_groups=2)
        >>> bn(torch.randn(4, 8, 2, 5, 5)).shape
        torch.Size([4, 8, 2, 5, 5])
    """
