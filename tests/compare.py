"""How far a result is off, in units in the last place, and the one rule the numerical tests apply:
ours may be off by no more than torch's own on the same input, plus one unit."""

from __future__ import annotations

import math

import torch
from problems import (
    Arguments,
    Problem,
    Result,
    channels_last,
    run_ours,
    run_reference,
    run_torch,
    same_format,
)
from torch import Tensor


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between two neighbours of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.double().abs().clamp(info.tiny, info.max))
    return torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)


def ulps_off(actual: Tensor, expected: Tensor) -> float:
    """The largest error of ``actual``, in ulps of the largest value of its channel (for a tensor (C,): of all of it).

    The largest, for where terms cancel the error is the terms', not the small result's.
    """
    if actual.numel() == 0:
        return 0.0
    expected = expected.double()
    others = [d for d in range(expected.dim()) if d != 1] if expected.dim() > 1 else [0]
    unit = ulp(expected.abs().amax(others, keepdim=True), actual.dtype)
    return ((actual.double() - expected).abs() / unit).max().item()


def assert_no_worse(ours: Result, torchs: Result, expected: Result, context: object) -> None:
    """The rule, for each part of the results; also that presence, dtype and shape agree with torch's."""
    for part in Result._fields:
        mine, theirs, exact = getattr(ours, part), getattr(torchs, part), getattr(expected, part)
        assert (mine is None) == (theirs is None), f"{context}: {part} is {mine}, torch's {theirs}"
        if mine is None:
            continue
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape), f"{context}: {part} is {mine.dtype} {mine.shape}"
        # The float64 formulas are themselves a few ulps off in float64.
        slack = 4.0 if mine.dtype == torch.float64 else 1.0
        off, allowed = ulps_off(mine, exact), ulps_off(theirs, exact) + slack
        if math.isnan(allowed):  # torch overflowed on its way to a finite result: no measure
            assert torch.isfinite(mine).all(), f"{context}: {part} overflowed"
            continue
        assert off <= allowed, f"{context}: {part} is {off:.3g} ulps off, torch's own {allowed - slack:.3g}"


def check(problem: Problem, device: str, backward: bool = False) -> None:
    """Runs ``problem`` and holds all that it gives to the rule; nothing but running statistics may be changed."""
    check_arguments(problem.arguments(device), backward, str(problem.mode))


def check_arguments(a: Arguments, backward: bool, context: str) -> None:
    input, dy = a.input.clone(), a.dy.clone()
    ours, torchs = run_ours(a, backward), run_torch(a, backward)
    assert_no_worse(ours, torchs, run_reference(a, backward), context)
    assert a.input.equal(input) and a.dy.equal(dy), f"{context}: an input was changed"
    if not a.training:
        assert ours.running_mean.equal(a.running_mean), "evaluation changed running_mean"
        assert ours.running_var.equal(a.running_var), "evaluation changed running_var"
    check_strides(a, ours, torchs, context)


def check_strides(a: Arguments, ours: Result, torchs: Result, context: str) -> None:
    """The output lies in memory as torch's does, the gradient of a dense input as the input."""
    if a.input.dim() == 3:  # torch knows no channels-last format of three dimensions
        return
    assert same_format(ours.output, torchs.output), f"{context}: the output's strides are {ours.output.stride()}"
    if ours.dx is not None and (a.input.is_contiguous() or channels_last(a.input).data_ptr() == a.input.data_ptr()):
        assert same_format(ours.dx, a.input), f"{context}: dx has strides {ours.dx.stride()}"
