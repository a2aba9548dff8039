"""The plans of the cases that are measured on a GPU, by the GPU's name."""

from __future__ import annotations

import math

from bench.workloads import sizes_of
from bn_ext._C import LaunchPlan, Pass, launch_plan

Case = tuple[str, str, str, str]  # shape, layout, dtype, pattern

# Words in a GPU's name, and the named limits for it.
LIMITS = {
    "h100": "h100",
    "h200": "h100",
    "b200": "b200",
    "a100": "a100",
    "5090": "rtx5090",
    "4090": "rtx4090",
    "t4": "t4",
}
DIRECTIONS = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
    "inference": ("inference",),
    "frozen": ("frozen",),
}


def limits_of(gpu: str) -> str | None:
    """The named limits for a GPU of this name."""
    words = gpu.lower().replace("-", " ").split()
    return next((limits for word, limits in LIMITS.items() if word in words), None)


def plan_of(case: Case, direction: str, limits: str) -> LaunchPlan:
    shape, layout, dtype, pattern = case
    n, c, *spatial = sizes_of(shape)
    frozen, residual, relu = direction == "frozen", "add" in pattern, "relu" in pattern
    call = Pass(
        (n, c, math.prod(spatial)),
        dtype=dtype,
        layout="planar" if layout == "contiguous" else "interleaved",
        direction="backward" if frozen else direction,
        activation="relu" if relu else "identity",
        residual=residual or (frozen and relu),  # a frozen layer has branch bits without a residual, too
    )
    if frozen:
        call = call.wanting({"dx", "dresidual"} if residual else {"dx"}, training=False)
    return launch_plan(call, gpu=limits)


def plans_of(case: Case, name: str, limits: str) -> list[LaunchPlan]:
    """A plan for each launch of the pass."""
    return [plan_of(case, direction, limits) for direction in DIRECTIONS[name]]


def on_chip(plans: list[LaunchPlan]) -> bool:
    """Whether each launch finds its tensors on chip the second time."""
    return all(plan.strategy in ("small", "resident") for plan in plans)


def in_words(plan: LaunchPlan) -> str:
    """The layout of a launch in a few words, for a table. Blocks are counted by team."""
    return f"{plan.strategy}, {plan.team}, {plan.teams} x {plan.team_blocks} blocks, slabs: {plan.slabs}"
