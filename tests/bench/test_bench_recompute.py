"""The networks in which outputs are made again, and the table of what that gives."""

from __future__ import annotations

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
