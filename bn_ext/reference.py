"""Batch normalization, and what follows it, in explicit float64 formulas: what every kernel is measured against.

Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1, with the biased variance in the
transform and the unbiased one in the running average. Everything returned is float64; shapes are
(N, C, *) for tensors and (C,) for everything per channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus


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


def pooled_variance(input: Tensor, set_size: int) -> Tensor:
    """The unbiased variance of each channel within its statistic sets, each a run of ``set_size`` images."""
    sets = input.split(set_size)
    m2 = sum(statistics(part)[1] * (part.numel() // part.size(1)) for part in sets)
    return m2 / (input.numel() // input.size(1) - len(sets))


def _doubled(z: Tensor) -> Tensor:
    """Twice the argument of the tanh in gelu_tanh: (1 + tanh(u / 2)) / 2 is sigmoid(u)."""
    return math.sqrt(8 / math.pi) * (z + 0.044715 * z**3)


def _doubled_slope(z: Tensor) -> Tensor:
    return math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * z**2)


# Value and derivative at z; p is the activation's parameter. At a kink, the derivative that torch takes.
_Function = Callable[[Tensor, float], Tensor]
ACTIVATIONS: dict[str, tuple[_Function, _Function]] = {
    "identity": (lambda z, p: z, lambda z, p: torch.ones_like(z)),
    "relu": (lambda z, p: z.clamp(min=0), lambda z, p: (z > 0).double()),
    "relu6": (lambda z, p: z.clamp(0, 6), lambda z, p: ((z > 0) & (z < 6)).double()),
    "leaky_relu": (lambda z, p: torch.where(z > 0, z, p * z), lambda z, p: torch.where(z > 0, torch.ones_like(z), p)),
    "elu": (
        lambda z, p: torch.where(z > 0, z, p * z.expm1()),
        lambda z, p: torch.where(z > 0, 1.0, p * z.exp()),
    ),
    "silu": (
        lambda z, p: z * z.sigmoid(),
        lambda z, p: z.sigmoid() * (1 + z * (-z).sigmoid()),
    ),
    "gelu": (
        lambda z, p: z * torch.special.ndtr(z),
        lambda z, p: torch.special.ndtr(z) + z * (-z * z / 2).exp() / math.sqrt(2 * math.pi),
    ),
    "hardswish": (
        lambda z, p: z * (z + 3).clamp(0, 6) / 6,
        lambda z, p: torch.where(z <= -3, 0.0, torch.where(z >= 3, 1.0, z / 3 + 0.5)),
    ),
    "hardsigmoid": (lambda z, p: (z + 3).clamp(0, 6) / 6, lambda z, p: (z.abs() < 3).double() / 6),
    "sigmoid": (lambda z, p: z.sigmoid(), lambda z, p: z.sigmoid() * (-z).sigmoid()),
    "tanh": (lambda z, p: z.tanh(), lambda z, p: z.cosh().square().reciprocal()),
    "mish": (
        lambda z, p: z * softplus(z).tanh(),
        lambda z, p: softplus(z).tanh() + z * z.sigmoid() * softplus(z).cosh().square().reciprocal(),
    ),
    "celu": (
        lambda z, p: torch.where(z > 0, z, p * (z.clamp(max=0) / p).expm1()),
        lambda z, p: torch.where(z > 0, 1.0, (z / p).exp()),
    ),
    "gelu_tanh": (
        lambda z, p: z * _doubled(z).sigmoid(),
        lambda z, p: _doubled(z).sigmoid() * (1 + z * (-_doubled(z)).sigmoid() * _doubled_slope(z)),
    ),
}


def activated(z: Tensor, activation: str | None, param: float) -> Tensor:
    """The activation, of the sum ``z`` of normalized values and residual."""
    return ACTIVATIONS[activation or "identity"][0](z, param)


def behind(dy: Tensor, z: Tensor, activation: str | None, param: float) -> Tensor:
    """The gradient with respect to ``z``, from that with respect to the activation's output."""
    return dy.double() * ACTIVATIONS[activation or "identity"][1](z, param)


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


def results(
    input: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: tuple[str | None, float],
) -> dict[str, Tensor]:
    """All results of ``activation(batch_norm(input) + residual)`` by name, ``dy`` being the output's gradient.

    ``norm`` has running mean and variance, weight and bias; ``activation`` its name and parameter. The running
    statistics of the results are those after the call.
    """
    running_mean, running_var, weight, bias = norm
    mean, var = statistics(input) if training else (running_mean.double(), running_var.double())
    z = forward(input, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.double()
    dz = behind(dy, z, *activation)
    dx, dweight, dbias = backward(dz, input, weight, mean, var, eps, training)
    found = {"output": activated(z, *activation), "dx": dx, "dweight": dweight, "dbias": dbias}
    if residual is not None:
        found["dresidual"] = dz
    if training:
        mean, var = running(running_mean, mean, momentum), running(running_var, unbiased(input, var), momentum)
    return found | {"running_mean": mean, "running_var": var}
