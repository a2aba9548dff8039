"""WAYS covers every strategy and team, with one channel and with several per thread."""

from __future__ import annotations

import itertools

from cases import channels_last
from ways import WAYS, plan_of

DIRECTIONS = ("forward", "backward")


def test_every_strategy_and_team() -> None:
    plans = [plan_of(case, direction) for case, direction in itertools.product(WAYS, DIRECTIONS)]
    found = {(p.strategy, p.team, p.per_lane) for p in plans}
    both = (False, True)
    assert found >= {("small", "block", lanes) for lanes in both}
    assert found >= {("resident", team, lanes) for team in ("block", "cluster", "grid") for lanes in both}
    assert found >= {("streaming", "grid", lanes) for lanes in both}
    assert any(p.team == "grid" and 1 < p.teams < p.slabs for p in plans), "teams with more than one slab"
    assert any(p.layout is channels_last for p in WAYS)
    assert all(plan_of(case, "inference").strategy == "elementwise" for case in WAYS)


def test_every_epilogue() -> None:
    """No residual and ReLU; a residual with nothing, with a mask that is written as it is and one that is zeroed
    first, with an activation that has no mask; by blocks and by grids, and in evaluation."""
    plans = [(p, plan_of(p, "forward")) for p in WAYS if p.mode.training]
    found = {(p.activation, p.residual, plan.team, plan.zeroed_branches) for p, plan in plans}
    assert ("relu", False, "block", False) in found
    assert (None, True, "block", False) in found
    assert found >= {("relu", True, "grid", zeroed) for zeroed in (False, True)}
    assert found >= {("relu", True, team, True) for team in ("block", "cluster")}
    assert found >= {("silu", True, team, False) for team in ("block", "grid")}
    assert {(p.activation, p.residual) for p in WAYS if not p.mode.training} == {(None, False), ("relu", True)}
