"""Outputs that are too large for the last cache are stored past it: the same bits by other instructions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import BFLOAT, DOUBLE, FLOAT, MODES, Case, Types, channels_last, contiguous, run_ours
from torch import Tensor

import bn_ext
from bn_ext import _C

CACHE = 1 << 14  # bytes


@pytest.fixture
def _small_cache() -> Iterator[None]:
    before = _C.set_last_cache_bytes(CACHE)
    yield
    _C.set_last_cache_bytes(before)


# Whether rows are whole lines. Joined planes, in tiles of which the last one is smaller; planes that are cut into
# segments or not; rows of channels.
PLANAR = {
    (9, 152, 14, 14): True,
    (9, 153, 14, 14): True,
    (9, 300, 7, 9): True,
    (3, 8, 28, 28): True,
    (2, 2, 160, 128): True,
    (3, 5, 29, 29): False,
    (700, 16): True,
}
INTERLEAVED = {(9, 160, 7, 7): True, (9, 153, 7, 7): False}
LAYOUTS = {contiguous: PLANAR, channels_last: INTERLEAVED}
CASES = [(shape, layout) for layout, shapes in LAYOUTS.items() for shape in shapes]


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=[f"{shape}-{layout.__name__}" for shape, layout in CASES])
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
@pytest.mark.parametrize(("residual", "activation"), [(False, None), (True, "relu"), (True, "silu")], ids=str)
def test_the_same_bits(
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    types: Types,
    residual: bool,
    activation: str | None,
    request: pytest.FixtureRequest,
) -> None:
    calls = [
        Case(shape, layout, types, mode, residual=residual, activation=activation).arguments("cpu")
        for mode in (MODES[0], MODES[2])
    ]
    through = [run_ours(a, backward=True) for a in calls]
    request.getfixturevalue("_small_cache")
    format = torch.contiguous_format if layout is contiguous else torch.channels_last
    assert bn_ext.plan(shape, types.input, format).bypass_cache == LAYOUTS[layout][shape]
    for one, a in zip(through, calls, strict=True):
        for name, before, behind in zip(one._fields, one, run_ours(a, backward=True), strict=True):
            assert before is behind is None or torch.equal(before, behind), name
