"""Batch normalization in explicit float64 formulas: what every kernel here is measured against.

Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1, with the biased variance in the
transform and the unbiased one in the running average. Everything returned is float64; shapes are
(N, C, *) for tensors and (C,) for everything per channel.
"""

from __future__ import annotations

from torch import Tensor


def _channels(input: Tensor, per_channel: Tensor) -> Tensor:
    """Views a (C,) tensor so that it broadcasts against (N, C, *)."""
    return per_channel.double().view(1, -1, *[1] * (input.dim() - 2))


def _others(input: Tensor) -> list[int]:
    return [d for d in range(input.dim()) if d != 1]


def statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``input`` (N, C, *): two tensors (C,)."""
    x = input.double()
    mean = x.mean(_others(x))
    return mean, (x - _channels(x, mean)).square().mean(_others(x))


def running(old: Tensor, observed: Tensor, momentum: float) -> Tensor:
    """The running average of a statistic (C,): ``momentum`` is the weight of the new value."""
    return (1 - momentum) * old.double() + momentum * observed


def unbiased(input: Tensor, var: Tensor) -> Tensor:
    """The biased variance ``var`` (C,) of ``input`` (N, C, *) with m - 1 in place of m."""
    count = input.numel() // input.size(1)
    return var * (count / (count - 1))


def forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """``(input - mean) / sqrt(var + eps) * weight + bias``."""
    output = (input.double() - _channels(input, mean)) * _channels(input, (var.double() + eps).rsqrt())
    if weight is not None:
        output = output * _channels(input, weight)
    if bias is not None:
        output = output + _channels(input, bias)
    return output


def backward(
    dy: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to input, weight and bias.

    In training, ``mean`` and ``var`` are the input's own and the gradient goes through them;
    otherwise they are constants.
    """
    dy = dy.double()
    invstd = (var.double() + eps).rsqrt()
    x_hat = (input.double() - _channels(input, mean)) * _channels(input, invstd)
    dbias = dy.sum(_others(dy))
    dweight = (dy * x_hat).sum(_others(dy))
    scale = invstd if weight is None else invstd * weight.double()
    dx = dy
    if training:
        count = max(input.numel() // input.size(1), 1)
        dx = dy - _channels(dy, dbias / count) - x_hat * _channels(dy, dweight / count)
    return dx * _channels(dy, scale), dweight, dbias
