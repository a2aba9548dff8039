"""How far a result is off, in units in the last place, and the one rule the numerical tests apply:
ours may be off by no more than torch's own on the same input, plus one unit."""

from __future__ import annotations

import math

import torch
from cases import (
    Arguments,
    Case,
    Expected,
    Result,
    channels_last,
    run_ours,
    run_reference,
    run_torch,
    same_format,
)
from torch import Tensor

SLACK = 1.0  # ulps that ours may be worse than torch's (more where many cases are drawn, to allow for chance)
CHANCE = 1.25  # times what is allowed: with other numbers of the same case the rule has to hold
FEW, LUCK = 64, 1.0  # of so few values, an error of torch's below so many ulps is luck


class OffByChanceError(AssertionError):
    """The largest error is that of a few values, of which torch's may have been lucky."""


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between two neighbours of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.double().abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def ulps_off(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest error of ``actual``, in ulps of the largest ``scale`` of its channel (of all, if (C,))."""
    if actual.numel() == 0:
        return 0.0
    actual = actual.to(expected.device)
    others = [d for d in range(scale.dim()) if d != 1] if scale.dim() > 1 else [0]
    unit = ulp(scale.abs().amax(others, keepdim=True), actual.dtype)
    return ((actual.double() - expected.double()).abs() / unit).max().item()


def assert_as_close(
    mine: Tensor, torchs: Tensor, exact: Tensor, scale: Tensor, what: str, slack: float = SLACK
) -> None:
    """The rule; also that dtype and shape are torch's. Integers have to be equal."""
    assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape), f"{what} is {mine.dtype} {tuple(mine.shape)}"
    if not mine.is_floating_point():
        assert torch.equal(mine, torchs), f"{what} is {mine}, torch's {torchs}"
        return
    off, torch_off = ulps_off(mine, exact, scale), ulps_off(torchs, exact, scale)
    if math.isnan(torch_off):  # torch overflowed on its way to a finite result: no measure
        assert torch.isfinite(mine).all(), f"{what} overflowed"
        return
    allowed = (max(torch_off, LUCK) if mine.numel() < FEW else torch_off) + slack
    if mine.dtype == torch.float64:  # all three sides round alike there: which is the better is chance
        allowed *= 4
    said = f"{what} is {off:.3g} ulps off, torch's own {torch_off:.3g}"
    if allowed < off <= CHANCE * allowed:
        raise OffByChanceError(said)
    assert off <= allowed, said


def assert_no_worse(ours: Result, torchs: Result, expected: Expected, context: str, slack: float = SLACK) -> None:
    """The rule, for each part of the results; what torch's lacks, ours lacks."""
    for part, mine, theirs, exact, scale in zip(Result._fields, ours, torchs, *expected, strict=True):
        assert (mine is None) == (theirs is None), f"{context}: {part} is {mine}, torch's {theirs}"
        if mine is not None:
            assert_as_close(mine, theirs, exact, scale, f"{context}: {part}", slack)


def assert_same_sums(one: Tensor, other: Tensor, what: str) -> None:
    """Bit by bit on the CPU; on a GPU, where work is cut by what there is of it, up to the order of adding."""
    if one.is_cpu:
        assert torch.equal(one, other), f"{what} differs"
    else:
        torch.testing.assert_close(one, other, msg=lambda m: f"{what}: {m}")


def check(case: Case, device: str, backward: bool = False, slack: float = SLACK) -> None:
    """Runs ``case``, with the same numbers each time, and holds all that it gives to the rule; nothing but running
    statistics may be changed. What seems to be off by chance has to hold with two other draws."""

    def draw(seed: int) -> None:
        torch.manual_seed(seed)
        check_arguments(case.arguments(device), backward, f"{case}, {case.mode}", slack)

    try:
        draw(0)
    except OffByChanceError:
        draw(1)
        draw(2)


def check_arguments(a: Arguments, backward: bool, context: str, slack: float = SLACK) -> None:
    input, dy = a.input.clone(), a.dy.clone()
    ours, torchs = run_ours(a, backward), run_torch(a, backward)
    assert_no_worse(ours, torchs, run_reference(a, backward), context, slack)
    assert a.input.equal(input) and a.dy.equal(dy), f"{context}: an input was changed"
    if not a.training:
        assert ours.running_mean.equal(a.running_mean), "evaluation changed running_mean"
        assert ours.running_var.equal(a.running_var), "evaluation changed running_var"
    check_strides(a, ours, torchs, context)


def check_strides(a: Arguments, ours: Result, torchs: Result, context: str) -> None:
    """The output lies in memory as torch's does, the gradient of a dense input as the input."""
    if a.input.dim() == 3:  # torch knows no channels-last format of three dimensions
        return
    dense = a.input.is_contiguous() or channels_last(a.input).data_ptr() == a.input.data_ptr()
    if dense or a.input.is_cpu:  # of other strides torch's kernels for the GPU make this or that
        assert same_format(ours.output, torchs.output), f"{context}: the output's strides are {ours.output.stride()}"
    if ours.dx is not None and dense:
        assert same_format(ours.dx, a.input), f"{context}: dx has strides {ours.dx.stride()}"
