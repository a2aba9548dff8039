"""The machine in words, the load of other processes, and durations in words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bn_ext.tools import machine
from bn_ext.tools.timing import duration

STAT = """\
cpu  30 0 30 100 40 0 0 0 0 0
cpu0 10 5 10 50 20 1 2 3 7 7
cpu1 20 0 20 50 20 0 0 0 0 0
intr 12
"""


def test_busy_counts_all_but_idle_and_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text(STAT)
    monkeypatch.setattr(machine, "_STAT", str(tmp_path / "stat"))
    monkeypatch.setattr(machine.os, "sysconf", lambda name: 10)
    assert machine.busy({0}) == pytest.approx(3.1) and machine.busy({0, 1}) == pytest.approx(7.1)
    assert machine.busy({5}) is None
    monkeypatch.setattr(machine, "_STAT", str(tmp_path / "none"))
    assert machine.busy({0}) is None and machine.Others().share() == 0


@pytest.mark.parametrize(("others", "share"), [(0.0, 0.0), (3.0, 0.75), (50.0, 1.0)])
def test_the_share_of_others(monkeypatch: pytest.MonkeyPatch, others: float, share: float) -> None:
    now = {"wall": 100.0, "own": 5.0, "all": 70.0}

    def read(name: str) -> Callable[..., float]:
        return lambda *_: now[name]

    monkeypatch.setattr(machine, "busy", read("all"))
    monkeypatch.setattr(machine.time, "perf_counter", read("wall"))
    monkeypatch.setattr(machine.time, "process_time", read("own"))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    found = machine.Others()
    now.update(wall=102.0, own=6.5, all=71.5 + others)
    assert found.share() == pytest.approx(share)
    assert found.notes() == (
        [f"Other processes took {100 * share:.0f} % of the cores' time: expect noise."] if share else []
    )


def test_real_time_passes() -> None:
    others = machine.Others()
    time.sleep(0.01)
    assert 0 <= others.share() <= 1


def test_tensors_in_words() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert machine.described(x) == "2x3x4x5 float32"
    assert machine.described(x.to(memory_format=torch.channels_last)) == "2x3x4x5 float32 channels last"
    assert machine.described(torch.empty(3, dtype=torch.int64)) == "3 int64"


def test_durations() -> None:
    assert [duration(s) for s in (2.5, 0.25, 0.0012, 3.2e-5)] == ["2.5 s", "250 ms", "1.2 ms", "32 µs"]
