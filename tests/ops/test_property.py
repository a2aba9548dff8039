"""Any case at all: hypothesis draws the shape, layout, number types and mode."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES, LAYOUTS, MODES, TYPES, Case
from compare import check

pytest.importorskip("hypothesis", reason="needs hypothesis, to draw cases")
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def cases(draw: st.DrawFn) -> Case:
    spatial = draw(st.lists(st.integers(1, 40), max_size=3))
    batch, channels = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    while batch * channels * torch.Size(spatial).numel() > 30_000:
        batch, channels, spatial = (batch + 1) // 2, (channels + 1) // 2, [(s + 1) // 2 for s in spatial]
    values = batch * torch.Size(spatial).numel()
    return Case(
        shape=(batch, channels, *spatial),
        layout=draw(st.sampled_from(LAYOUTS)),
        types=draw(st.sampled_from(TYPES)),
        mode=draw(st.sampled_from(MODES if values > 1 else MODES[2:])),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.75])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        offset=draw(st.sampled_from([0.0, 2.0, 20.0])),
        dy_layout=draw(st.sampled_from([None, *LAYOUTS])),
    )


@pytest.mark.parametrize("device", DEVICES)
# The same examples in every run, so that a failure is everyone's failure.
@settings(max_examples=300, deadline=None, derandomize=True, print_blob=False)
@given(case=cases(), seed=st.integers(0, 2**31), threads=st.integers(1, 4))
def test_any_case(case: Case, seed: int, threads: int, device: str) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    check(case, device, backward=True, slack=3.0)
