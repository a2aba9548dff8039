"""Batch normalization, and what follows it, in explicit float64 formulas: what every kernel is measured against.

Source: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1, with the biased variance in the
transform and the unbiased one in the running average. Everything returned is float64; shapes are
(N, C, *) for tensors and (C,) for everything per channel.

A mask (N, *) has bools, or numbers >= 0, by which the statistics weigh the values. Where it is 0, inputs
may be anything: outputs and gradients are 0.
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


def weights(input: Tensor, mask: Tensor | None) -> Tensor:
    """How much the values of ``input`` (N, C, *) count, (N, 1, *)."""
    return torch.ones_like(input[:, :1], dtype=torch.float64) if mask is None else mask.double().unsqueeze(1)


def selected(t: Tensor, mask: Tensor | None) -> Tensor:
    """``t`` (N, C, *), and 0 where the mask is."""
    return t.double() if mask is None else torch.where(mask.unsqueeze(1) > 0, t.double(), 0.0)


def _shared_out(t: Tensor, weights: Tensor) -> Tensor:
    """The sum of each channel of ``t`` (N, C, *) over the number of values that count, (C,): 0 if none do."""
    count = weights.sum()
    return t.sum(_others(t)) / torch.where(count > 0, count, 1.0)


def statistics(input: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of ``input`` (N, C, *): two tensors (C,). 0 if no value counts."""
    x, w = selected(input, mask), weights(input, mask)
    mean = _shared_out(x * w, w)
    return mean, _shared_out((x - _channels(x, mean)).square() * w, w)


def running(old: Tensor, observed: Tensor, momentum: float) -> Tensor:
    """The running average of a statistic (C,): ``momentum`` is the weight of the new value."""
    return (1 - momentum) * old.double() + momentum * observed


def freedom(input: Tensor, mask: Tensor | None = None) -> float:
    """The number that divides m2 for the unbiased variance: m - 1 of m values, and 0 of less than two."""
    w = weights(input, mask)
    return (w.sum() - w.square().sum() / w.sum()).item() if (w > 0).sum() > 1 else 0.0


def unbiased(input: Tensor, var: Tensor, mask: Tensor | None = None) -> Tensor:
    """The unbiased variance (C,) of at least two values, from the biased one of ``input`` (N, C, *)."""
    return var * (weights(input, mask).sum() / freedom(input, mask))


def pooled_variance(input: Tensor, set_size: int, mask: Tensor | None = None) -> Tensor:
    """The unbiased variance of each channel within its statistic sets, each a run of ``set_size`` images."""
    parts = input.split(set_size)
    sets = list(zip(parts, [None] * len(parts) if mask is None else mask.split(set_size), strict=True))
    m2 = torch.stack([statistics(*one)[1] * weights(*one).sum() for one in sets]).sum(0)
    return m2 / math.fsum(freedom(*one) for one in sets)


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
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to input, weight and bias.

    In training, ``mean`` and ``var`` are the input's own and the gradient goes through them;
    otherwise they are constants.
    """
    dy, x, w = selected(dy, mask), selected(input, mask), weights(input, mask)
    invstd = (var.double() + eps).rsqrt()
    x_hat = (x - _channels(x, mean)) * _channels(x, invstd)
    scale = invstd if weight is None else invstd * weight.double()
    dx = dy
    if training:
        through_mean, through_var = (_channels(dy, _shared_out(t, w)) for t in (dy, dy * x_hat))
        dx = dy - w * (through_mean + x_hat * through_var)
    return dx * _channels(dy, scale), (dy * x_hat).sum(_others(dy)), dy.sum(_others(dy))


def results(
    input: Tensor,
    residual: Tensor | None,
    dy: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor],
    training: bool,
    momentum: float,
    eps: float,
    activation: tuple[str | None, float],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """All results of ``activation(batch_norm(input) + residual)`` by name, ``dy`` being the output's gradient.

    ``norm`` has running mean and variance, weight and bias; ``activation`` its name and parameter. The running
    statistics of the results are those after the call, which leaves them alone if less than two values count.
    """
    running_mean, running_var, weight, bias = norm
    mean, var = statistics(input, mask) if training else (running_mean.double(), running_var.double())
    z = forward(input, weight, bias, mean, var, eps)
    if residual is not None:
        z = z + residual.double()
    dz = selected(behind(dy, z, *activation), mask)
    dx, dweight, dbias = backward(dz, input, weight, mean, var, eps, training, mask)
    found = {"output": selected(activated(z, *activation), mask), "dx": dx, "dweight": dweight, "dbias": dbias}
    if residual is not None:
        found["dresidual"] = dz
    moves = training and freedom(input, mask) > 0
    found["running_mean"] = running(running_mean, mean, momentum) if moves else running_mean.double()
    found["running_var"] = running(running_var, unbiased(input, var, mask), momentum) if moves else running_var.double()
    return found
