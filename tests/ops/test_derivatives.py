"""Derivatives of any order, in training mode and float64, are those of batch normalization written in primitives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp

import bn_ext

Function = Callable[[Tensor], Tensor]
SHAPE = (3, 2, 2)
X, V, W = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT, BIAS = torch.tensor([[1.5, -0.5], [0.2, 0.3]], dtype=torch.float64)
EPS = 1e-5
BEHIND = {
    "alone": (None, None),
    "residual and silu": (V, "silu"),
    "broadcast residual and tanh": (V[:, :1], "tanh"),
    "residual of another type and silu": (V.float(), "silu"),
}


def ours(x: Tensor, weight: Tensor, bias: Tensor, behind: str) -> Tensor:
    residual, activation = BEHIND[behind]
    return bn_ext.functional.batch_norm(
        x, None, None, weight, bias, training=True, eps=EPS, residual=residual, activation=activation
    )


def primitives(x: Tensor, weight: Tensor, bias: Tensor, behind: str) -> Tensor:
    residual, activation = BEHIND[behind]
    xmu = x - x.mean((0, 2), keepdim=True)
    y = xmu * (xmu.square().mean((0, 2), keepdim=True) + EPS).rsqrt() * weight[:, None] + bias[:, None]
    y = y if residual is None else y + residual
    return y if activation is None else getattr(F, activation)(y)


def loss(batch_norm: Callable[..., Tensor], behind: str) -> Callable[[Tensor], Tensor]:
    """Of input, weight and bias in one vector; no derivative of it is zero."""

    def of(packed: Tensor) -> Tensor:
        x, weight, bias = packed[: X.numel()].view(SHAPE), packed[-4:-2], packed[-2:]
        return (batch_norm(x, weight, bias, behind) * W).exp().sum()

    return of


def along(f: Function, direction: Tensor) -> Function:
    return lambda p: (grad(f)(p) * direction).sum()


def forward(f: Function, direction: Tensor) -> Function:
    return lambda p: jvp(f, (p,), (direction,))[1]


def by_autograd(f: Function, *directions: Tensor) -> Function:
    def of(p: Tensor) -> Tensor:
        p = p.clone().requires_grad_()
        value = f(p)
        for direction in directions:
            value = (torch.autograd.grad(value, p, create_graph=True)[0] * direction).sum()
        return value

    return of


def dual(f: Function, direction: Tensor) -> Function:
    def of(p: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(p.clone(), direction))).tangent

    return of


P = torch.cat([X.flatten(), WEIGHT, BIAS])
D1, D2, D3, D4 = torch.randn(4, P.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
DERIVATIVES: dict[str, Callable[[Function], Function]] = {
    "grad": grad,
    "second": lambda f: grad(along(f, D1)),
    "third": lambda f: grad(along(along(f, D1), D2)),
    "fourth": lambda f: grad(along(along(along(f, D1), D2), D3)),
    "jvp": lambda f: forward(f, D1),
    "jvp of jvp": lambda f: forward(forward(f, D1), D2),
    "jvp of jvp of jvp": lambda f: forward(forward(forward(f, D1), D2), D3),
    "jvp of grad": lambda f: forward(grad(f), D1),
    "grad of jvp": lambda f: grad(forward(f, D1)),
    "jvp of jvp of grad": lambda f: forward(forward(grad(f), D1), D2),
    "hessian": hessian,
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "vjp": lambda f: lambda p: vjp(f, p)[1](torch.ones((), dtype=torch.float64))[0],
    "autograd, first": lambda f: by_autograd(f, D1),
    "autograd, second": lambda f: by_autograd(f, D1, D2),
    "autograd, third": lambda f: by_autograd(f, D1, D2, D3),
    "autograd, fourth": lambda f: by_autograd(f, D1, D2, D3, D4),
    "dual": lambda f: dual(f, D1),
    "dual of autograd": lambda f: dual(by_autograd(f, D2), D1),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("behind", BEHIND)
def test_derivatives(derivative: str, behind: str) -> None:
    expected, got = (DERIVATIVES[derivative](loss(f, behind))(P) for f in (primitives, ours))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
