"""Several statistic sets in one call: each is normalized as a call of its own, parameters and running statistics are
shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    Arguments,
    Case,
    Types,
    channels_last,
    contiguous,
    same_format,
    transposed,
)
from compare import assert_same_sums
from staged import fused
from torch import Tensor

from bn_ext import reference

BATCH_NORM = torch.ops.bn_ext.batch_norm

# Sets of one image, of some, with a smaller last one; many sets and few; short planes, long planes, rows; one channel.
SETS = [
    ((6, 35, 7), contiguous, 1),
    ((6, 3, 1), contiguous, 2),
    ((64, 35), contiguous, 8),
    ((600, 35), contiguous, 7),
    ((6, 1, 100), contiguous, 2),
    ((16, 32, 8, 8), contiguous, 4),
    ((33, 5, 7, 7), channels_last, 4),
    ((10, 3, 4, 5), transposed, 3),
    ((7, 6, 40, 40), contiguous, 2),
    ((7, 6, 40, 40), channels_last, 3),
    ((40, 20, 33, 20), channels_last, 2),
    ((100, 70, 14, 14), contiguous, 32),
]
sets = pytest.mark.parametrize(
    ("shape", "layout", "set_size"), SETS, ids=lambda v: v.__name__ if callable(v) else str(v)
)
TAILS = [(False, None), (True, "relu"), (True, "silu")]
tails = pytest.mark.parametrize(("residual", "activation"), TAILS, ids=str)


def case(shape: Any, layout: Callable, types: Types = FLOAT, residual: bool = False, activation: Any = None) -> Case:
    return Case(shape, layout, types, residual=residual, activation=activation)


def pooled(a: Arguments, set_size: int, momentum: float) -> dict[str, Tensor]:
    """The running statistics: towards the mean of all values and the unbiased variance within the sets."""
    x = a.input.double()
    return {
        "running_mean": a.running_mean.double().lerp(reference.statistics(x)[0], momentum),
        "running_var": a.running_var.double().lerp(reference.pooled_variance(x, set_size), momentum),
    }


@tails
@sets
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_each_set_is_a_call_of_its_own(shape, layout, set_size, types, residual, activation, device: str) -> None:
    """Bit by bit; parameters' gradients are the sums over the sets, which float32 and bfloat16 then round."""
    a = case(shape, layout, types, residual, activation).arguments(device)
    together = fused(a, set_size)
    summed = {"dweight": 0.0, "dbias": 0.0}
    for i in range(0, shape[0], set_size):

        def part(t: Tensor | None, i: int = i) -> Tensor | None:
            return None if t is None else layout(t[i : i + set_size])

        one = fused(replace(a, input=part(a.input), dy=part(a.dy), residual=part(a.residual)), None)
        for name in ("output", "dx", "dresidual"):
            if name in one:
                assert_same_sums(together[name][i : i + set_size], one[name], f"{name} of the set at {i}")
        summed = {name: total + one[name].double() for name, total in summed.items()}
    for name, total in summed.items():
        eps = torch.finfo(together[name].dtype).eps
        bound = (len(range(0, shape[0], set_size)) + 1) * eps * max(1, total.abs().max())
        torch.testing.assert_close(together[name].double(), total, rtol=8 * eps, atol=bound.item())
    for name, expected in pooled(a, set_size, 0.1).items():
        torch.testing.assert_close(together[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert together["batches"] == 4
    assert same_format(together["output"], fused(a, None)["output"])


@tails
@pytest.mark.parametrize("shape", [(6, 35, 7), (64, 35), (7, 6, 40, 40)], ids=str)
@pytest.mark.parametrize("more", [0, 5, 2**63 - 100])
def test_a_set_of_all_images_is_no_set(shape, more: int, residual, activation, device: str) -> None:
    a = case(shape, contiguous, FLOAT, residual, activation).arguments(device)
    one, plain = fused(a, shape[0] + more), fused(a, None)
    for name, value in plain.items():
        assert torch.equal(one[name], value), name


def test_evaluation_knows_no_sets(device: str) -> None:
    a = case((6, 35, 7), contiguous).arguments(device)
    one, plain = fused(a, 2, training=False), fused(a, None, training=False)
    for name, value in plain.items():
        assert torch.equal(one[name], value), name


def test_cumulative_average(device: str) -> None:
    a = case((7, 6, 4, 4), channels_last).arguments(device)
    for name, expected in pooled(a, 3, 1 / 4).items():
        torch.testing.assert_close(fused(a, 3, momentum=None)[name].double(), expected, rtol=1e-5, atol=1e-5)


@sets
def test_threads_change_nothing(shape, layout, set_size) -> None:
    a = case(shape, layout, FLOAT, True, "relu").arguments("cpu")
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        results.append(fused(a, set_size))
    torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def leaves_of(shape: tuple[int, ...], device: str) -> tuple[Tensor, ...]:
    channels = shape[1]
    sizes = shape, (channels,), (channels,), shape
    return tuple(torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in sizes)


def by_primitives(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, set_size: int, activation: Any) -> Tensor:
    """By primitives."""
    others = [0, *range(2, x.dim())]
    per_channel = (-1, *[1] * (x.dim() - 2))

    def normalized(part: Tensor) -> Tensor:
        xmu = part - part.mean(others, True)
        return xmu * (xmu.square().mean(others, True) + 1e-5).rsqrt()

    z = torch.cat([normalized(part) for part in x.split(set_size)])
    z = z * weight.view(per_channel) + bias.view(per_channel) + residual
    return z if activation is None else getattr(torch.nn.functional, activation)(z)


def by_operator(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, set_size: int, activation: Any) -> Tensor:
    return BATCH_NORM(x, weight, bias, None, None, None, True, 0.1, 1e-5, residual, activation, None, set_size)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (4, 2, 2, 3)], ids=str)
def test_gradcheck(shape, activation, device: str) -> None:
    call = partial(by_operator, set_size=2, activation=activation)
    leaves = leaves_of(shape, device)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def scalar(function: Callable[..., Tensor], activation: Any, *leaves: Tensor) -> Tensor:
    return function(*leaves, set_size=2, activation=activation).square().sin().sum()


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("name", ["grad", "hessian", "jacfwd"])
def test_transforms(name: str, activation: Any, device: str) -> None:
    leaves = tuple(t.detach() for t in leaves_of((5, 2, 3), device))
    every = tuple(range(4))
    transform = getattr(torch.func, name)
    ours = transform(partial(scalar, by_operator, activation), argnums=every)(*leaves)
    primitives = transform(partial(scalar, by_primitives, activation), argnums=every)(*leaves)
    torch.testing.assert_close(ours, primitives)


def test_third_derivative(device: str) -> None:
    def third(function: Callable[..., Tensor]) -> Tensor:
        torch.manual_seed(0)
        leaves = leaves_of((5, 2, 3), device)
        value = scalar(function, "silu", *leaves)
        for _ in range(3):
            value = torch.autograd.grad(value, leaves[0], create_graph=True)[0].square().sum()
        return value

    torch.testing.assert_close(third(by_operator), third(by_primitives))


@pytest.mark.parametrize("residual", [(1, 3, 1), (3, 1)], ids=str)
def test_residual_that_torch_adds(residual: tuple[int, ...], device: str) -> None:
    """Statistics as without it, to torch's rounding: torch's operators answer such a call."""
    x, small = torch.randn(5, 3, 7, device=device), torch.randn(residual, device=device)
    running = [[torch.zeros(3, device=device), torch.ones(3, device=device)] for _ in range(2)]
    call = partial(BATCH_NORM, x, None, None)
    one = call(*running[0], None, True, 0.1, 1e-5, small, "relu", None, 2)
    other = call(*running[1], None, True, 0.1, 1e-5, None, None, None, 2)
    torch.testing.assert_close(one, (other + small).relu())
    torch.testing.assert_close(running[0], running[1])


def test_compiled_whole(device: str) -> None:
    a = case((6, 35, 7), contiguous, FLOAT, True, "relu").arguments(device)

    def step(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return BATCH_NORM(x, weight, a.bias, None, None, None, True, 0.1, 1e-5, residual, "relu", None, 4)

    leaves = [t.detach().requires_grad_() for t in (a.input, a.weight, a.residual)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 5):
        args = [leaves[0][:rows], leaves[1], leaves[2][:rows]]
        expected, got = step(*args), compiled(*args)
        assert torch.equal(got, expected)
        for one, other in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, expected)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("set_size", [2, 100])
def test_compiled_transforms(set_size: int, device: str) -> None:
    """The number of images is not known when the graph is made; the last set is smaller, or not."""
    torch._dynamo.reset()
    weight = torch.randn(3, device=device)

    def gradient(x: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            mean, var, batches = x.new_zeros(3), x.new_ones(3), torch.tensor(0, device=device)
            norm = weight, None, mean, var, batches, True, 0.1, 1e-5
            return (BATCH_NORM(x, *norm, set_size=set_size).square().sin().sum() + (mean * var).sum()) * batches

        return torch.func.grad(value)(x)

    compiled = torch.compile(gradient, backend="eager", dynamic=True, fullgraph=True)
    for images in (5, 6):
        x = torch.randn(images, 3, 4, device=device)
        torch.testing.assert_close(compiled(x), gradient(x))


@pytest.mark.parametrize("set_size", [0, -3])
def test_sets_without_images(set_size: int, device: str) -> None:
    a = case((6, 3, 7), contiguous).arguments(device)
    before = a.running_mean.clone()
    with pytest.raises(ValueError, match=f"set_size should be positive, got {set_size}"):
        BATCH_NORM(a.input, None, None, a.running_mean, a.running_var, None, True, 0.1, 1e-5, set_size=set_size)
    assert torch.equal(a.running_mean, before)


def test_sets_of_one_value(device: str) -> None:
    """Refused, but for a last set that is smaller than the others."""
    x = torch.randn(5, 3, device=device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BATCH_NORM(x, None, None, None, None, None, True, 0.1, 1e-5, set_size=1)
    output = BATCH_NORM(x, None, torch.arange(3.0, device=device), None, None, None, True, 0.1, 1e-5, set_size=2)
    assert torch.equal(output[-1], torch.arange(3.0, device=device))


def test_no_images(device: str) -> None:
    x = torch.randn(0, 3, 2, device=device, requires_grad=True)
    weight = torch.ones(3, device=device, requires_grad=True)
    output = BATCH_NORM(x, weight, None, None, None, None, True, 0.1, 1e-5, set_size=2)
    dx, dweight = torch.autograd.grad(output.sum(), (x, weight))
    assert output.shape == dx.shape == (0, 3, 2)
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_forward_mode_moves_the_running_statistics(momentum: float | None, device: str) -> None:
    """Primitives answer there, and move them as the kernels do."""
    a = case((7, 6, 4, 4), contiguous, DOUBLE).arguments(device)
    running, batches = [a.running_mean.clone(), a.running_var.clone()], torch.tensor(3, device=device)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(a.input, a.dy)
        BATCH_NORM(x, a.weight, a.bias, *running, batches, True, momentum, a.eps, set_size=3)
    by_kernels = fused(a, 3, momentum=momentum)
    for name, one in zip(("running_mean", "running_var", "batches"), (*running, batches), strict=True):
        torch.testing.assert_close(one, by_kernels[name])
