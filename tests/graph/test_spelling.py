"""Every way to write an addition and an activation is one, and gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fusing import Called, Model, assert_same, branches, fused_with
from torch import Tensor, nn

import bn_ext


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


ACTIVATIONS: dict[str, list[Callable]] = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        F.relu_,
        torch.relu,
        torch.relu_,
        lambda y: y.relu(),
        lambda y: y.relu_(),
        lambda y: F.relu(y, True),
        lambda y: F.relu(input=y, inplace=True),
        lambda y: [F.relu_(y), y][1],
    ],
    "relu6": [
        nn.ReLU6(),
        nn.ReLU6(inplace=True),
        F.relu6,
        lambda y: F.relu6(y, inplace=True),
        nn.Hardtanh(0, 6),
        lambda y: F.hardtanh(y, 0, 6),
        lambda y: F.hardtanh_(y, min_val=0.0, max_val=6.0),
    ],
    "leaky_relu": [
        nn.LeakyReLU(),
        nn.LeakyReLU(0.3, inplace=True),
        nn.LeakyReLU(0),
        F.leaky_relu,
        lambda y: F.leaky_relu(y, 0.3, True),
        lambda y: F.leaky_relu(y, negative_slope=0.3),
        lambda y: F.leaky_relu_(y, 0.3),
    ],
    "elu": [
        nn.ELU(),
        nn.ELU(0.3, inplace=True),
        F.elu,
        lambda y: F.elu(y, 0.3, inplace=True),
        lambda y: F.elu(y, alpha=2),
        lambda y: F.elu_(y, 0.3),
    ],
    "silu": [
        nn.SiLU(),
        nn.SiLU(inplace=True),
        F.silu,
        lambda y: F.silu(y, inplace=True),
        lambda y: y * torch.sigmoid(y),
        lambda y: y.sigmoid() * y,
        lambda y: y.mul(F.sigmoid(y)),
        lambda y: y.mul_(y.sigmoid()),
    ],
    "gelu": [nn.GELU(), nn.GELU("none"), F.gelu, lambda y: F.gelu(y, approximate="none")],
    "hardswish": [
        nn.Hardswish(),
        nn.Hardswish(inplace=True),
        F.hardswish,
        lambda y: F.hardswish(y, True),
        lambda y: y * F.relu6(y + 3) / 6,
        lambda y: y * (F.relu6(y + 3, inplace=True) / 6),
        lambda y: y * F.hardtanh(y + 3, 0.0, 6.0) / 6.0,
        lambda y: y * (3 + y).clamp(0, 6) / 6,
        lambda y: y * F.hardsigmoid(y),
    ],
    "hardsigmoid": [
        nn.Hardsigmoid(),
        nn.Hardsigmoid(inplace=True),
        F.hardsigmoid,
        lambda y: F.hardsigmoid(y, True),
        lambda y: F.relu6(y + 3) / 6,
        lambda y: F.relu6(y.add_(3.0)).div_(6),
    ],
    "sigmoid": [nn.Sigmoid(), F.sigmoid, torch.sigmoid, torch.sigmoid_, lambda y: y.sigmoid(), lambda y: y.sigmoid_()],
    "tanh": [nn.Tanh(), F.tanh, torch.tanh, torch.tanh_, lambda y: y.tanh(), lambda y: y.tanh_()],
    "mish": [
        nn.Mish(),
        nn.Mish(inplace=True),
        F.mish,
        lambda y: F.mish(y, inplace=True),
        lambda y: y * torch.tanh(F.softplus(y)),
        lambda y: y.mul(F.softplus(y).tanh()),
    ],
    "celu": [  # torch's gradient has 1 / alpha in float32: alphas for which that is exact
        nn.CELU(),
        nn.CELU(0.25, inplace=True),
        F.celu,
        torch.celu,
        torch.celu_,
        lambda y: F.celu(y, 0.25, inplace=True),
        lambda y: F.celu(y, alpha=2),
        lambda y: torch.celu_(y, 0.25),
    ],
    "gelu_tanh": [nn.GELU("tanh"), lambda y: F.gelu(y, approximate="tanh")],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    acts = ACTIVATIONS[name]
    # torch's gradient of a hardsigmoid has a sixth in float32
    tolerance = 1e-7 if name.startswith("hards") else 1e-10
    fused = assert_same(branches(Model(lambda m, y, r: m.act(y), act=act) for act in acts), tolerance=tolerance)
    assert fused_with(fused) == {f"{i}.bn": (name,) for i in range(len(acts))}


def test_every_activation_is_spelled_here() -> None:
    assert {"identity", *ACTIVATIONS} == set(bn_ext.activation.NAMES)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "elu", "celu", "hardsigmoid"])
def test_gradients_at_kinks(name: str) -> None:
    """A constant channel gives exactly the bias."""
    acts = ACTIVATIONS[name]
    model = branches(nn.Sequential(nn.BatchNorm2d(4), Called(act)) for act in acts).double()
    for part in model.values():
        part[0].bias.data = torch.tensor([0.0, 3.0, -3.0, 6.0], dtype=torch.float64)
    biases = [part[0].bias for part in model.values()]
    x = torch.ones(2, 4, 2, 2, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).sum(), biases)
    found = torch.autograd.grad(bn_ext.fuse(model)(x).sum(), biases)
    for act, one, other in zip(acts, found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=0, msg=str(act))
    assert fused_with(model) == {f"{i}.0": (name,) for i in range(len(acts))}


def add_in_place(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


def into_the_other(y: Tensor, r: Tensor) -> Tensor:
    r += y
    return r


ADDITIONS: list[Callable] = [
    lambda y, r: y + r,
    lambda y, r: r + y,
    add_in_place,
    into_the_other,
    torch.add,
    lambda y, r: torch.add(r, y),
    lambda y, r: torch.add(other=y, input=r, alpha=1),
    lambda y, r: y.add(r),
    lambda y, r: r.add(other=y, alpha=1),
    lambda y, r: y.add_(r),
    lambda y, r: [y.add_(r), y][1],
    lambda y, r: sum([y, r]),
    lambda y, r: 0 + y + r,
    lambda y, r: y + r + 0,
    lambda y, r: (torch._C._log_api_usage_once("bn_ext.test"), y + r)[1],  # as torchvision's operators do
    lambda y, r: F.dropout(y, 0.0) + r,
]


@pytest.mark.parametrize("finish", [lambda y: y, F.relu, F.silu], ids=["identity", "relu", "silu"])
def test_additions(finish: Callable) -> None:
    fused = assert_same(branches(Model(lambda m, y, r, add=add: finish(add(y, r))) for add in ADDITIONS))
    expected = ("add", *([finish.__name__] if finish in (F.relu, F.silu) else []))
    assert fused_with(fused) == {f"{i}.bn": expected for i in range(len(ADDITIONS))}
