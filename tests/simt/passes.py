"""A forward and a backward by the kernels on the model of a GPU, their results, and every way through the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cases import Arguments, Case, Result, channels_last, contiguous
from simt.batch_norm import Device, Kernels, Tail, empty_branches
from torch import Tensor

KIB = 1024

# Small GPUs with hardly more shared memory than sums need, so that blocks have to share small tensors.
ROOMY = Device(8, 48 * KIB, 100 * KIB, 16)
CLUSTERS = Device(2, 36 * KIB, 74 * KIB, 16)
NO_CLUSTERS = Device(2, 40 * KIB, 82 * KIB, 1)
DEVICES = {"roomy": ROOMY, "clusters": CLUSTERS, "no clusters": NO_CLUSTERS}

# One case for each way through the kernels: rows of one channel or of several; a block, a cluster, a grid that
# holds everything or streams.
WAYS = [
    ((2, 32, 8, 8), contiguous, ROOMY),
    ((5, 35, 7), contiguous, ROOMY),
    ((2, 3, 50, 60), contiguous, CLUSTERS),
    ((64, 5, 7, 7), contiguous, CLUSTERS),
    ((600, 35), contiguous, NO_CLUSTERS),
    ((1, 2, 8193), contiguous, NO_CLUSTERS),
    ((2, 40, 25, 30), channels_last, NO_CLUSTERS),
]


def limits_of(device: Device) -> tuple[int, ...]:
    """A device as it can be sent to another process."""
    return tuple(getattr(device, name) for name, _ in Device._fields_)


class Pass(NamedTuple):
    """The results of one forward and one backward."""

    y: Tensor
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def both_passes(
    kernels: Kernels, case: Case, device: Device, momentum: float | None = None, **of_backward: Any
) -> Pass:
    a = case.arguments("cpu")
    running = a.running_mean.clone(), a.running_var.clone()
    batches = torch.tensor(41)
    out = kernels.forward(device, a.input, *running, a.weight, a.bias, a.training, momentum, batches=batches)
    gradients = kernels.backward(device, a.dy, a.input, a.weight, a.bias, *out[1:], a.training, **of_backward)
    return Pass(*out, *running, batches, *gradients[:3])


def assert_same_bits(one: Pass | Result, other: Pass | Result) -> None:
    for part, a, b in zip(one._fields, one, other, strict=True):
        assert (a is None) == (b is None), part
        assert a is None or torch.equal(a, b), part


# The activations with two slopes, each with the branch of z: one bit per element, all that the gradient needs of z.
BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z <= 0,
    "relu6": lambda z: (z <= 0) | (z >= 6),
    "leaky_relu": lambda z: z > 0,
    "hardsigmoid": lambda z: (z > -3) & (z < 3),
}


def together(
    kernels: Kernels,
    device: Device,
    a: Arguments,
    branches: Tensor | None = None,
    wanted: Sequence[bool] | None = None,
    **of_backward: Any,
) -> Result:
    """A forward and a backward by the kernels. With branch bits, the forward fills them, and the backward reads them in
    place of the residual."""
    tail = Tail(a.activation or "identity", a.param, a.residual, branches)
    running = a.running_mean.clone(), a.running_var.clone()
    y, *statistics = kernels.forward(device, a.input, *running, a.weight, a.bias, a.training, tail=tail)
    if branches is not None:
        tail = tail._replace(residual=None)
    inputs = a.dy, a.input, a.weight, a.bias, *statistics, a.training
    wanted = wanted or (True, True, True, a.residual is not None)
    return Result(y, *running, *kernels.backward(device, *inputs, wanted, tail, **of_backward))


def bits_of(branches: Tensor, like: Tensor) -> Tensor:
    """Branch bits as a tensor of bools, laid out as ``like``."""
    bits = branches.unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1).bool().flatten()
    return bits.as_strided(like.shape, like.stride())


class Chained(NamedTuple):
    """A result and its branch bits, as bools, where its activation has one."""

    result: Result
    branches: Tensor | None


def chained(kernels: Kernels, device: Device, case: Case, seed: int = 0, name: str = "relu") -> Chained:
    """The results with a residual and an activation."""
    kernels.configure(seed, preempt=seed % 3 * 20)
    torch.manual_seed(0)
    a = replace(case, residual=True, activation=name).arguments("cpu")
    branches = empty_branches(a.input) if name in BRANCHES else None
    result = together(kernels, device, a, branches)
    kernels.configure()
    return Chained(result, None if branches is None else bits_of(branches, a.input))


def assert_same(one: Chained, other: Chained) -> None:
    assert one.branches is None or torch.equal(one.branches, other.branches), "branches"
    assert_same_bits(one.result, other.result)
