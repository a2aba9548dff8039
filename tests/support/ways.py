"""Problems that together have every strategy and team of a plan for an H100, each as small as it can be."""

from __future__ import annotations

import math

from problems import BFLOAT, FLOAT, MODES, Problem, channels_last, contiguous

from bn_ext._C import LaunchPlan, Pass, launch_plan

PLAIN = [
    Problem((5, 3, 35), contiguous, FLOAT),  # a block each
    Problem((64, 16), contiguous, FLOAT),
    Problem((3, 65, 7, 7), contiguous, BFLOAT),
    Problem((33, 140, 7, 7), channels_last, FLOAT),
    Problem((3, 300, 5, 8), contiguous, FLOAT),  # more blocks than multiprocessors
    Problem((33, 700, 4, 4), contiguous, BFLOAT),
    Problem((1, 3, 20001), contiguous, FLOAT),  # clusters
    Problem((20000, 24), contiguous, FLOAT),
    Problem((2, 2, 1 << 19), contiguous, FLOAT),  # a grid
    Problem((1, 3, 1 << 21), contiguous, FLOAT),  # slab after slab
    Problem((80000, 40), contiguous, FLOAT),
    Problem((1, 2, 1 << 23), contiguous, FLOAT),  # too much for the chip
    Problem((600000, 20), contiguous, FLOAT),
]
FUSED = [
    Problem((3, 300, 5, 8), contiguous, FLOAT, activation="relu"),
    Problem((33, 700, 4, 4), contiguous, BFLOAT, residual=True),
    Problem((20000, 24), contiguous, FLOAT, residual=True, activation="relu"),  # whole bytes of the mask
    Problem((2, 2, 1 << 19), contiguous, FLOAT, residual=True, activation="relu"),
    Problem((5, 3, 35), contiguous, BFLOAT, residual=True, activation="relu"),  # a zeroed mask
    Problem((1, 3, 20001), contiguous, FLOAT, residual=True, activation="relu"),
    Problem((33, 140, 7, 7), channels_last, BFLOAT, residual=True, activation="relu"),
    Problem((2, 3, (1 << 19) - 1), contiguous, FLOAT, residual=True, activation="relu"),
    Problem((3, 65, 7, 7), contiguous, BFLOAT, residual=True, activation="silu"),
    Problem((80000, 40), contiguous, FLOAT, residual=True, activation="silu"),
]
EVALUATED = [
    Problem((5, 3, 35), contiguous, FLOAT, MODES[2]),
    Problem((33, 140, 7, 7), channels_last, BFLOAT, MODES[2], residual=True, activation="relu"),
]
WAYS = [*PLAIN, *FUSED, *EVALUATED]


def plan_of(problem: Problem, direction: str) -> LaunchPlan:
    images, channels, *spatial = problem.shape
    call = Pass(
        images,
        channels,
        math.prod(spatial),
        dtype=str(problem.types.input).removeprefix("torch."),
        layout="planar" if problem.layout is contiguous else "interleaved",
        direction=direction,
        activation=problem.activation or "identity",
        residual=problem.residual,
    )
    return launch_plan(call)
