"""Forward against torch and the float64 formulas, on the grid of shapes, layouts, number types and modes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cases import (
    DOUBLE,
    FLOAT,
    LARGE_GRID,
    MODES,
    SMALL_GRID,
    TYPES,
    Case,
    Types,
    channels_last,
    contiguous,
)
from compare import check


@pytest.mark.parametrize("case", SMALL_GRID, ids=str)
def test_small(case: Case, device: str) -> None:
    for mode in MODES:
        check(replace(case, mode=mode), device)


@pytest.mark.parametrize("case", LARGE_GRID, ids=str)
def test_large(case: Case, device: str) -> None:
    for mode in (MODES[0], MODES[2]):
        check(replace(case, mode=mode), device)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias(layout, types: Types, mode, affine: tuple[bool, bool], device: str) -> None:
    check(Case((3, 19, 5, 7), layout, types, mode, *affine), device)


@pytest.mark.parametrize("types", [FLOAT, DOUBLE], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, -1.2])
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 2.0])
def test_momentum_and_eps(types: Types, momentum: float, eps: float, device: str) -> None:
    check(Case((4, 7, 6, 6), types=types, momentum=momentum, eps=eps), device)


@pytest.mark.parametrize("shape", [(1, 3), (1, 5, 1), (1, 3, 1, 1)])
def test_evaluation_of_one_value_a_channel(shape: tuple[int, ...], device: str) -> None:
    check(Case(shape, mode=MODES[2]), device)
