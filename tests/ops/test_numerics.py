"""Inputs that are hard on the arithmetic: large offsets, constant channels, extreme magnitudes, NaN and infinity."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    MODES,
    TYPES,
    Arguments,
    Case,
    Result,
    Types,
    channels_last,
    contiguous,
    run_ours,
    run_reference,
    run_torch,
)
from compare import assert_same_sums, check, check_arguments, ulps_off

HALF = Types(torch.float16, torch.float32, torch.float32)
SHAPES = [(67, 5), (4, 3, 49), (3, 35, 5, 7), (2, 6, 41, 43), (5, 2, 3, 31, 33)]
both_layouts = pytest.mark.parametrize("layout", [contiguous, channels_last])


@both_layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("types", "offset"),
    [(FLOAT, 1e2), (FLOAT, 1e4), (FLOAT, 1e6), (DOUBLE, 1e6), (DOUBLE, 1e12), (BFLOAT, 30.0), (HALF, 300.0)],
    ids=str,
)
def test_mean_far_larger_than_deviation(shape, layout, types: Types, offset: float, device: str) -> None:
    for mode in MODES:
        check(Case(shape, layout, types, mode, offset=offset), device, backward=True)


@pytest.mark.parametrize("shape", [(1, 1, 2**24 + 3), (2**19 + 1, 5)], ids=str)
def test_long_reduction(shape: tuple[int, ...], device: str) -> None:
    """The first has more values a channel than float32 can count."""
    check(Case(shape, offset=10.0), device)


@both_layouts
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0, 1e6])
@pytest.mark.parametrize("shape", [(3, 5), (7, 3, 3), (3, 35, 5, 7), (2, 3, 67, 35)], ids=str)
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_constant_channels_give_exactly_the_bias(shape, layout, value: float, types: Types, device: str) -> None:
    if types.input == torch.float16:
        value = min(value, 6e4)
    a = Case(shape, layout, types).arguments(device)
    a.input = layout(torch.full(shape, value, dtype=types.input, device=device))
    per_channel = (1, -1, *[1] * (len(shape) - 2))
    bias = a.bias.to(types.input).view(per_channel).expand(shape)
    assert torch.equal(run_ours(a).output, bias)
    check_arguments(a, True, "constant")


@both_layouts
@pytest.mark.parametrize("value", [0.1, 1e6])
def test_almost_constant_channels(layout, value: float, device: str) -> None:
    """One value of each channel is off by one ulp."""
    a = Case((3, 35, 15, 9), layout).arguments(device)
    x = torch.full(a.input.shape, value, device=device)
    x[1, :, 3, 4] = torch.nextafter(x[1, :, 3, 4], torch.tensor(torch.inf, device=device))
    a.input = layout(x)
    check_arguments(a, True, "almost constant")


@both_layouts
def test_one_outlier(layout, device: str) -> None:
    a = Case((3, 35, 15, 9), layout).arguments(device)
    a.input[1, :, 3, 4] = 1e8
    # The outlier's own gradient is the difference of equals: a draw of four roundings, by us and by torch.
    check_arguments(a, True, "outlier", slack=2.0)


@both_layouts
@pytest.mark.parametrize(
    ("types", "scale"),
    [(FLOAT, s) for s in (1e-40, 1e-20, 1e10, 1e18)] + [(BFLOAT, 1e-20), (BFLOAT, 1e10), (HALF, 1e-6), (HALF, 1e3)],
    ids=str,
)
def test_extreme_magnitudes(layout, types: Types, scale: float, device: str) -> None:
    for mode in MODES:
        a = Case((3, 35, 5, 7), layout, types, mode).arguments(device)
        a.input = a.input * scale
        check_arguments(a, True, f"{mode}, times {scale}")


@both_layouts
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("scale", [1e19, 1e30, 1e37])
def test_sums_beyond_the_range_of_float(scale: float, types: Types, layout, device: str) -> None:
    """torch's own results are lost there, so that it is no measure."""
    a = Case((3, 35, 5, 7), layout, types).arguments(device)
    a.input = a.input * scale
    a.running_var = a.running_mean = None
    ours, expected = run_ours(a, backward=True), run_reference(a, backward=True)
    for part in ("output", "dx", "dweight", "dbias"):
        off = ulps_off(getattr(ours, part), getattr(expected.result, part), getattr(expected.scale, part))
        assert off <= 2, f"{part} is {off:.3g} ulps off"


@both_layouts
@pytest.mark.parametrize("shape", [(67, 5), (4, 3, 49), (2, 6, 41, 43)], ids=str)
def test_gradient_keeps_the_digits_of_the_mean(shape, layout, device: str) -> None:
    """torch rounds the mean to float, so that it is no measure here."""
    a = Case(shape, layout, FLOAT, offset=1e6).arguments(device)
    expected = run_reference(a, backward=True)
    assert ulps_off(run_ours(a, backward=True).dx, expected.result.dx, expected.scale.dx) <= 2


# ---------------------------------------------------------------------------------------------- NaN and infinity

PLACES = {"first": (0, 1, 0, 0), "middle": (1, 1, 2, 3), "last": (-1, 1, -1, -1)}
POISONS = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def assert_poison_as_torch(a: Arguments, clean: Result, context: str) -> None:
    """NaN and infinities where torch has them on the CPU; the channels not poisoned, all but 1, as without."""
    ours, torchs = run_ours(a, True), run_torch(a.to("cpu"), True)
    for part in Result._fields:
        mine, theirs, pure = (getattr(r, part) for r in (ours, torchs, clean))
        if mine is None:
            continue
        theirs = theirs.to(mine.device)
        assert torch.equal(mine.isnan(), theirs.isnan()), f"{context}: {part} has other NaN than torch's"
        assert torch.equal(mine.isposinf(), theirs.isposinf()), f"{context}: {part} has other inf than torch's"
        assert torch.equal(mine.isneginf(), theirs.isneginf()), f"{context}: {part} has other -inf than torch's"
        others, channel = torch.tensor([0, 2], device=mine.device), min(mine.dim() - 1, 1)
        one, other = (t.index_select(channel, others) for t in (mine, pure))
        assert_same_sums(one, other, f"{context}: {part}, of channels not poisoned,")


@both_layouts
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT, HALF], ids=str)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("part", ["input", "dy"])
def test_poisoned_element(part: str, poison: str, types: Types, layout, device: str) -> None:
    for shape, mode in itertools.product([(2, 3, 5, 7), (3, 3, 37, 33)], MODES):
        a = Case(shape, layout, types, mode).arguments(device)
        clean = run_ours(a, backward=True)
        for name, place in PLACES.items():
            poisoned = getattr(a, part).clone()
            poisoned[place] = POISONS[poison]
            assert_poison_as_torch(replace(a, **{part: poisoned}), clean, f"{mode}, {name} of {shape}")


@both_layouts
@pytest.mark.parametrize("poison", [*POISONS, "-2"])
@pytest.mark.parametrize("part", ["weight", "bias", "running_mean", "running_var"])
def test_poisoned_parameter(part: str, poison: str, layout, device: str) -> None:
    for mode in MODES:
        a = Case((2, 3, 5, 7), layout, mode=mode).arguments(device)
        if getattr(a, part) is None:
            continue
        clean = run_ours(a, backward=True)
        getattr(a, part)[1] = float(poison)
        assert_poison_as_torch(a, clean, str(mode))


@both_layouts
def test_weight_zero(layout, device: str) -> None:
    """The output is the bias; the gradient of the weight is not zero."""
    for mode in MODES:
        a = Case((3, 35, 5, 7), layout, mode=mode).arguments(device)
        a.weight.zero_()
        assert torch.equal(run_ours(a).output, a.bias.view(1, -1, 1, 1).expand(a.input.shape))
        check_arguments(a, True, str(mode))


@both_layouts
def test_evaluation_with_eps_zero(layout, device: str) -> None:
    check(Case((3, 35, 5, 7), layout, mode=MODES[2], eps=0.0), device, backward=True)
