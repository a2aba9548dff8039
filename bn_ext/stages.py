"""The stages of a batch norm as functions of their own, for whatever stands between them: a collective over processes,
statistics of other values, more batches.

``elemt(x, merge_stats(stats(x), ...), ...)`` is the forward of a batch norm in training, ``backward_reduce`` and
``backward_elemt`` its backward. The stages have no derivatives of their own: who composes them defines the gradient of
the whole, as a :class:`torch.autograd.Function`. To differentiate a stage is an error that names it.

Statistics and sums are float64, of sizes (C,). With a ``set_size`` they are (sets, C), and counts (sets,): each run of
``set_size`` images, the last of which may be shorter, is a statistic set. An input may have one value per channel, or
none. A set of one value is normalized to 0: the output is the bias.

A mask, (N, *), bool or numbers, says how much each value counts; what is not positive does not. Counts are sums of the
mask.

The values of counts are not checked, which would make a GPU wait.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bn_ext import activation as activations
from bn_ext.functional import check_tensor

_OPS = torch.ops.bn_ext


class Moments(NamedTuple):
    """The number of a channel's values, their mean, and the sum of squared deviations from the mean."""

    counts: Tensor
    mean: Tensor
    m2: Tensor

    def each(self, eps: float = 1e-5) -> Statistics:
        """The statistics by which each set is normalized by itself. :func:`merge_stats` merges the sets into one."""
        counts = torch.where(self.counts > 0, self.counts, 1).unsqueeze(-1)
        return Statistics(self.counts, self.mean, 1 / (self.m2 / counts + eps).sqrt())

    def merged(self) -> Moments:
        """The moments of all rows together, merged in their order."""
        counts, mean, invstd = merge_stats(self, eps=0.0)
        # 1 / invstd**2 is the biased variance, to a rounding; of equal values invstd is infinite.
        return Moments(counts, mean, counts / invstd.square())


class Statistics(NamedTuple):
    """The statistics by which a channel is normalized: the number of values, their mean, 1 / sqrt(var + eps)."""

    counts: Tensor
    mean: Tensor
    invstd: Tensor


class Sums(NamedTuple):
    """The sums over a channel of dz, the gradient of the activation's input, and of dz * (input - mean)."""

    dz: Tensor
    dz_xmu: Tensor

    def gradients(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias, (C,) in float64. Sets are added up."""
        dweight = self.dz_xmu * statistics.invstd
        return (dweight, self.dz) if dweight.dim() == 1 else (dweight.sum(0), self.dz.sum(0))


class Chain(NamedTuple):
    """The operations behind the normalization: ``activation(normalized + residual)``.

    A forward with ``keeps_branches`` also gives the branch of each element's activation, a bit; a backward that has
    these ``branches`` needs no residual. For activations of two linear pieces, such as relu.
    """

    residual: Tensor | None = None
    activation: activations.Name | None = None
    activation_param: float | None = None
    keeps_branches: bool = False
    branches: Tensor | None = None

    def _numbers(self) -> tuple[int, float]:
        """The activation as operators take it."""
        activations.check(self.activation, self.activation_param)
        name = self.activation or "identity"
        param = activations.DEFAULTS[name] if self.activation_param is None else self.activation_param
        return activations.NAMES.index(name), param or 0.0


_NOTHING = Chain()


def weights_of(mask: Tensor | None, input: Tensor) -> Tensor | None:
    """A mask as operators take it."""
    if mask is None:
        return None
    check_tensor("mask", mask)
    return _OPS.batch_norm_mask(input, mask)


def stats(input: Tensor, set_size: int | None = None, mask: Tensor | None = None) -> Moments:
    """The statistics of each channel, or of each statistic set and channel.

    Args:
        input: of float64, float32, bfloat16 or float16, of any strides.
        set_size: images of a statistic set, or None for one set.
        mask: how much each value counts, or None for 1.

    Shape:
        - input: (N, C, *).
        - mask: (N, *).
        - counts: (), with a set_size (sets,).
        - mean, m2: (C,), with a set_size (sets, C).

    Returns:
        Moments, in float64. Where there are no values all three are 0.

    Raises:
        RuntimeError: an input of fewer than two dimensions.
        ValueError: a ``set_size`` that is not positive; a mask of other sizes.
        NotImplementedError: an input that is not of a floating dtype.

    Example:
        >>> bn_ext.stages.stats(torch.tensor([[1.0], [3.0]])).m2
        tensor([2.], dtype=torch.float64)
    """
    return Moments(*_OPS.batch_norm_stats(input, set_size, weights_of(mask, input)))


def merge_stats(
    moments: Moments,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Statistics:
    """Merges rows of statistics in their order, and updates the running statistics. It reads per-channel tensors alone.

    Args:
        moments: the rows, of several sets, batches or processes; a row without values, whose count is 0, negative or
            NaN, counts for nothing.
        running_mean, running_var: moved, in place, towards the mean and the unbiased variance of all values; left alone
            where there is at most one. Of any floating dtype.
        num_batches_tracked: int64; counted up by one.
        momentum: weight of these values in the running statistics, or None for a cumulative average.
        eps: added to the variance.

    Shape:
        - moments.counts: (), or (rows,).
        - moments.mean, moments.m2: (C,), or (rows, C).
        - running_mean, running_var: (C,).
        - counts: (); mean, invstd: (C,).

    Returns:
        Statistics of all values together, in float64.

    Raises:
        RuntimeError: a size, dtype or device that does not fit.
        ValueError: a negative ``eps``; one of the running statistics alone; a cumulative average without its counter.

    Example:
        >>> x = torch.randn(8, 3, 5)
        >>> all_at_once = bn_ext.stages.merge_stats(bn_ext.stages.stats(x, set_size=2))
        >>> torch.allclose(all_at_once.mean, x.double().mean((0, 2)))
        True

    Source: Chan, Golub & LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """
    return Statistics(
        *_OPS.batch_norm_merge_stats(*moments, running_mean, running_var, num_batches_tracked, momentum, eps)
    )


def elemt(
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chain: Chain = _NOTHING,
    set_size: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalizes with statistics that are given, then adds the residual and applies the activation, element by element.

    Args:
        input: of float64, float32, bfloat16 or float16, of any strides.
        statistics: a row for each set, in float64; the counts are not read.
        weight, bias: for all sets, or a row for each; of the input's dtype or, for a half-precision input, float32;
            None for 1 and 0.
        chain: what follows the normalization.
        set_size: images of a statistic set, or None for one set.
        mask: where it is not positive, the output is 0.

    Shape:
        - input, output: (N, C, *).
        - mask: (N, *).
        - weight, bias: (C,), or with a set_size (sets, C).

    Returns:
        The output, and the branches of the activation, as bytes of eight, where the chain keeps them, else None.

    Raises:
        RuntimeError: a size, dtype or device that does not fit the input; branches of an activation that has none.
        ValueError: an unknown activation, or a parameter that it does not take; a mask of other sizes.

    Example:
        >>> x = torch.randn(8, 3, 5)
        >>> y, _ = bn_ext.stages.elemt(x, bn_ext.stages.stats(x, set_size=2).each(), set_size=2)
        >>> y[:2].mean().abs() < 1e-6
        tensor(True)
    """
    fused = chain.residual, *chain._numbers(), set_size, chain.keeps_branches
    of_channels = weight, bias, statistics.mean, statistics.invstd
    output, branches = _OPS.batch_norm_elemt(input, *of_channels, *fused, weights_of(mask, input))
    return output, branches


def backward_reduce(
    dy: Tensor,
    input: Tensor,
    statistics: Statistics,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chain: Chain = _NOTHING,
    set_size: int | None = None,
    mask: Tensor | None = None,
) -> Sums:
    """The sums over each channel, or each set and channel, that the gradients are made of.

    Args:
        dy: the gradient of the output, as the input.
        input, statistics, weight, bias, chain, set_size, mask: as of :func:`elemt`.

    Shape:
        - dy: (N, C, *).
        - dz, dz_xmu: (C,), with a set_size (sets, C).

    Returns:
        Sums, in float64.

    Raises:
        RuntimeError, ValueError: as :func:`elemt`.

    Example:
        >>> x = torch.randn(8, 3, 5)
        >>> statistics = bn_ext.stages.merge_stats(bn_ext.stages.stats(x))
        >>> bn_ext.stages.backward_reduce(torch.ones_like(x), x, statistics).dz
        tensor([40., 40., 40.], dtype=torch.float64)
    """
    fused = chain.residual, chain.branches, *chain._numbers(), set_size
    of_channels = weight, bias, statistics.mean, statistics.invstd
    return Sums(*_OPS.batch_norm_backward_reduce(dy, input, *of_channels, *fused, weights_of(mask, input)))


def backward_elemt(
    dy: Tensor,
    input: Tensor,
    statistics: Statistics,
    sums: Sums,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    chain: Chain = _NOTHING,
    set_size: int | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of input and residual, through statistics of ``statistics.counts`` values that have these sums.

    Args:
        dy: the gradient of the output, as the input.
        sums: of :func:`backward_reduce`, over all values that the statistics are of.
        input, statistics, weight, bias, chain, set_size, mask: as of :func:`elemt`; the counts are read here. They
            should be positive where there are values: the sums are divided by them, whatever they are.

    Shape:
        - dy, dx, dresidual: (N, C, *).

    Returns:
        dx and dresidual, of the dtype of ``input``; for dresidual None where the chain has no residual or branches.

    Raises:
        RuntimeError, ValueError: as :func:`elemt`.

    Example:
        >>> x, stages = torch.randn(8, 3, 5), bn_ext.stages
        >>> dy = torch.ones_like(x)
        >>> statistics = stages.merge_stats(stages.stats(x))
        >>> dx, _ = stages.backward_elemt(dy, x, statistics, stages.backward_reduce(dy, x, statistics))
        >>> dx.abs().max() < 1e-6  # of a gradient that is the same everywhere nothing is left
        tensor(True)
    """
    of_channels = weight, bias, statistics.mean, statistics.invstd, *sums, statistics.counts
    fused = chain.residual, chain.branches, *chain._numbers(), set_size
    wanted = [True, chain.residual is not None or chain.branches is not None]
    dx, dresidual = _OPS.batch_norm_backward_elemt(dy, input, *of_channels, *fused, wanted, weights_of(mask, input))
    return dx, dresidual
