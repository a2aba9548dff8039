"""The problems that stand for all plans do stand for all plans."""

from __future__ import annotations

import itertools

from problems import channels_last
from ways import WAYS, plan_of

DIRECTIONS = ("forward", "backward")


def test_every_strategy_and_team() -> None:
    plans = [plan_of(problem, direction) for problem, direction in itertools.product(WAYS, DIRECTIONS)]
    found = {(p.strategy, p.team, p.per_lane) for p in plans}
    both = (False, True)
    assert found >= {("small", "block", lanes) for lanes in both}
    assert found >= {("resident", team, lanes) for team in ("block", "cluster", "grid") for lanes in both}
    assert found >= {("streaming", "grid", lanes) for lanes in both}
    assert any(p.team == "grid" and 1 < p.teams < p.slabs for p in plans), "teams with more than one slab"
    assert any(p.layout is channels_last for p in WAYS)
    assert all(plan_of(problem, "inference").strategy == "elementwise" for problem in WAYS)
