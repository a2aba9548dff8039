"""The networks in which outputs are made again, and the table of what that gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no part of the installed package

from bench import recompute
from bench.zoo import NETWORKS

# In thousands, as the papers' code bases have them.
PARAMETERS = {
    "MobileNetV2": 3505,
    "EfficientNet-B0": 5289,
    "DenseNet-121": 7979,
    "VGG-16": 138366,
    "ResNet-18": 11690,
    "ResNet-50": 25557,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_their_sizes(name: str) -> None:
    with torch.device("meta"):
        network = NETWORKS[name][0]()
    assert round(sum(p.numel() for p in network.parameters()) / 1e3) == PARAMETERS[name]


def test_table() -> None:
    case = {"network": "N", "layout": "contiguous", "dtype": "float32", "batch": 2, "kept": 2_000_000}
    rows = [
        {**case, "kept_over": kept, "held_over": kept, "peak_over": 0.5, "median_ms": 10.0, "over_fused": 1.1}
        for kept in (1, 0.7, 0.4)
    ]
    rows[-1]["same_bits"] = False
    line = recompute.table(rows).splitlines()[-1]
    expected = "N, contiguous, float32, batch 2 | 2.0 MB | 70% | 40% **other bits** | 40% | 50% | 10 / 10 / 10 | 1.10 |"
    assert line == f"| {expected}"
    for row in rows:
        del row["median_ms"], row["over_fused"]
    assert recompute.table(rows).endswith("| 40% | 50% |  |  |")


def test_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each way, with medians over the processes. (What a process finds, the processes that run it tell.)"""
    found = iter((1.5, 1.1, 1.2))

    def in_a_process(what: str, *arguments: object, environment: object = None) -> object:
        if what == "held":
            return 10, 20
        over = next(found)
        return {way: (3.0, over) for way in recompute.WAYS}

    monkeypatch.setattr(recompute, "SIZE", 32)
    monkeypatch.setattr(recompute, "in_a_process", in_a_process)
    monkeypatch.setitem(NETWORKS, "ResNet-18", (NETWORKS["ResNet-18"][0], 2))
    rows = recompute.measure("ResNet-18", "contiguous", "float32", 0, 1, processes=3)
    assert [row["way"] for row in rows] == [*recompute.WAYS]
    assert all(row["over_fused"] == 1.2 and row["held_over"] == 1 and row["kept"] > 0 for row in rows)
    assert rows[-1]["same_bits"] and rows[-1]["kept_over"] < 1


def test_what_a_process_finds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SIZE", 32)
    monkeypatch.setitem(NETWORKS, "ResNet-18", (NETWORKS["ResNet-18"][0], 2))
    case = ["ResNet-18", "contiguous", "float32"]
    assert recompute.main(["--held", *case, recompute.FUSED]) == 0
    assert recompute.main(["--times", *case, "0", "2"]) == 0
    (_, _), times = map(json.loads, capsys.readouterr().out.splitlines())
    assert [*times] == [*recompute.WAYS] and times[recompute.FUSED][1] == 1
