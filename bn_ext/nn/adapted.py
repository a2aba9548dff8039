"""Evaluation by a mixture of the running statistics and the batch's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bn_ext.functional import exporting, finished, has_kernels
from bn_ext.stages import Chain, Moments, Statistics, Sums, backward_elemt, backward_reduce, elemt, stats


class Mixture(NamedTuple):
    """Running statistics with a weight of ``share``, and with the rest of 1 those of the batch."""

    running_mean: Tensor
    running_var: Tensor
    share: float
    eps: float

    def of(self, moments: Moments) -> Statistics:
        counts = moments.counts.clamp(min=1)
        mean = moments.mean.lerp(self.running_mean.double(), self.share)
        var = (moments.m2 / counts).lerp(self.running_var.double(), self.share)
        return Statistics(counts, mean, (var + self.eps).rsqrt())


def adapted(input: Tensor, weight: Tensor | None, bias: Tensor | None, mixture: Mixture, chain: Chain) -> Tensor:
    """Normalizes by a mixture of statistics, and differentiates through the batch's part of it."""
    if exporting() or not has_kernels(input.device) or torch._C._are_functorch_transforms_active():
        output = _by_primitives(input, weight, bias, mixture)
        return finished(output, chain.residual, chain.activation, chain.activation_param)
    residual = chain.residual
    if residual is not None and (residual.shape, residual.dtype) != (input.shape, input.dtype):
        output = _Adapted.apply(input, weight, bias, None, mixture, Chain())
        return finished(output, residual, chain.activation, chain.activation_param)
    return _Adapted.apply(input, weight, bias, residual, mixture, chain._replace(residual=None))


def _by_primitives(input: Tensor, weight: Tensor | None, bias: Tensor | None, mixture: Mixture) -> Tensor:
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    others = [0, *range(2, x.dim())]

    def spread(t: Tensor) -> Tensor:
        return t.to(x.dtype).view(-1, *[1] * (x.dim() - 2))

    mean = x.mean(others).lerp(mixture.running_mean.to(x.dtype), mixture.share)
    var = x.var(others, unbiased=False).lerp(mixture.running_var.to(x.dtype), mixture.share)
    z = (x - spread(mean)) * spread((var + mixture.eps).rsqrt())
    z = z if weight is None else z * spread(weight)
    return (z if bias is None else z + spread(bias)).to(input.dtype)


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mixture: Mixture,
        chain: Chain,
    ) -> Tensor:
        moments = stats(input)
        statistics = mixture.of(moments)
        output, _ = elemt(input, statistics, weight, bias, chain._replace(residual=residual))
        ctx.save_for_backward(input, weight, bias, residual, moments.mean, *statistics)
        ctx.share, ctx.chain = mixture.share, chain
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, residual, batch_mean, *rest = ctx.saved_tensors
        statistics = Statistics(*rest)
        chain = ctx.chain._replace(residual=residual)
        sums = backward_reduce(dy, input, statistics, weight, bias, chain)
        # Mean and variance move with the input by the batch's part alone, the variance about the batch's own mean.
        apart = (statistics.mean - batch_mean) * statistics.invstd.square()
        through = Sums((sums.dz + apart * sums.dz_xmu) * (1 - ctx.share), sums.dz_xmu * (1 - ctx.share))
        dx, dresidual = backward_elemt(dy, input, statistics, through, weight, bias, chain)
        dweight, dbias = sums.gradients(statistics)
        return (
            dx,
            None if weight is None else dweight.to(weight.dtype),
            None if bias is None else dbias.to(bias.dtype),
            dresidual,
            None,
            None,
        )
