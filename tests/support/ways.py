"""Problems that together have every strategy and team of a plan for an H100, each as small as it can be."""

from __future__ import annotations

import math

from cases import BFLOAT, FLOAT, MODES, Case, channels_last, contiguous

from bn_ext._C import LaunchPlan, Pass, launch_plan

PLAIN = [
    Case((5, 3, 35), contiguous, FLOAT),  # a block each
    Case((64, 16), contiguous, FLOAT),
    Case((3, 65, 7, 7), contiguous, BFLOAT),
    Case((33, 140, 7, 7), channels_last, FLOAT),
    Case((3, 300, 5, 8), contiguous, FLOAT),  # more blocks than multiprocessors
    Case((33, 700, 4, 4), contiguous, BFLOAT),
    Case((1, 3, 20001), contiguous, FLOAT),  # clusters
    Case((20000, 24), contiguous, FLOAT),
    Case((2, 2, 1 << 19), contiguous, FLOAT),  # a grid
    Case((1, 3, 1 << 21), contiguous, FLOAT),  # slab after slab
    Case((80000, 40), contiguous, FLOAT),
    Case((1, 2, 1 << 23), contiguous, FLOAT),  # too much for the chip
    Case((600000, 20), contiguous, FLOAT),
]
FUSED = [
    Case((3, 300, 5, 8), contiguous, FLOAT, activation="relu"),
    Case((33, 700, 4, 4), contiguous, BFLOAT, residual=True),
    Case((20000, 24), contiguous, FLOAT, residual=True, activation="relu"),  # whole bytes of the mask
    Case((2, 2, 1 << 19), contiguous, FLOAT, residual=True, activation="relu"),
    Case((5, 3, 35), contiguous, BFLOAT, residual=True, activation="relu"),  # a zeroed mask
    Case((1, 3, 20001), contiguous, FLOAT, residual=True, activation="relu"),
    Case((33, 140, 7, 7), channels_last, BFLOAT, residual=True, activation="relu"),
    Case((2, 3, (1 << 19) - 1), contiguous, FLOAT, residual=True, activation="relu"),
    Case((3, 65, 7, 7), contiguous, BFLOAT, residual=True, activation="silu"),
    Case((80000, 40), contiguous, FLOAT, residual=True, activation="silu"),
]
EVALUATED = [
    Case((5, 3, 35), contiguous, FLOAT, MODES[2]),
    Case((33, 140, 7, 7), channels_last, BFLOAT, MODES[2], residual=True, activation="relu"),
]
WAYS = [*PLAIN, *FUSED, *EVALUATED]


def plan_of(case: Case, direction: str) -> LaunchPlan:
    images, channels, *spatial = case.shape
    call = Pass(
        (images, channels, math.prod(spatial)),
        dtype=str(case.types.input).removeprefix("torch."),
        layout="planar" if case.layout is contiguous else "interleaved",
        direction=direction,
        activation=case.activation or "identity",
        residual=case.residual,
    )
    return launch_plan(call)
