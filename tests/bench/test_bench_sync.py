"""``python -m bench.sync`` on a small network, and its formula beside what a call sends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bn_ext
from bench import sync
from bench.sync import OURS, TORCHS, traffic
from bn_ext.nn.ranks import Ranks


def test_traffic_is_what_a_call_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, int] = {}

    def gathered(self: Ranks, packed: Tensor, layer: str) -> Tensor:
        sent["gathered"] = packed.nbytes
        return packed.expand(self.number, -1)

    def summed(self: Ranks, packed: Tensor, layer: str) -> Tensor:
        sent["summed"] = packed.nbytes
        return packed * self.number

    monkeypatch.setattr(Ranks, "gathered", gathered)
    monkeypatch.setattr(Ranks, "summed", summed)
    monkeypatch.setattr("bn_ext.nn.sync.ranks_of", lambda group, device: Ranks("", 4, 0))
    monkeypatch.setattr("bn_ext.nn.sync.agree", lambda *given: None)
    bn_ext.SyncBatchNorm(5)(torch.randn(3, 5, requires_grad=True)).sum().backward()
    row = traffic([5], 4, OURS)
    assert row["bytes"] == 3 * sent["gathered"] + 2 * 3 / 4 * sent["summed"]
    assert (row["collectives"], row["waits"]) == (2, 0)
    assert traffic([5, 7], 2, TORCHS)["waits"] == 2
    assert traffic([5], 1, OURS)["bytes"] == 0


def test_every_way_is_validated_and_timed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert sync.main(["--width", "2", "--shape", "4x3x32x32", "--rounds", "1", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["way"] for row in record["rows"]] == [sync.PLAIN, sync.SYNC, sync.COLLECTIVES]
    assert record["rows"][0]["over_plain"] == 1
    assert len(record["traffic"]) == 2 * 2 * len(sync.RANKS)
