"""``python -m bench.sets`` on small shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import sets
from bench.sets import PLAIN


def test_every_way_is_validated_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--shapes", "70x5x6", "--dtypes", "float32", "bfloat16", "--seconds", "0.01", "--rounds", "1"]
    assert sets.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    ways = [PLAIN, "virtual", "chunks", "torch's chunks"], [PLAIN, "mask", "cut out"]
    assert [row["way"] for row in rows] == 2 * ways[0] + 2 * ways[1]
    assert all(row["over_plain"] == 1 for row in rows if row["way"] == PLAIN)
    monkeypatch.setattr(sets, "padding", lambda x: torch.ones(len(x), *x.shape[2:]) * (torch.rand(len(x), 1) > 0.9))
    monkeypatch.setattr(sets, "cut_out", lambda x, mask: sets.normalized(x))
    with pytest.raises(AssertionError, match="not close"):
        sets.main([*arguments, "--kinds", "mask"])
