"""`make gpu`: every phase runs and is accounted for, whatever becomes of the others."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "gpu.py"


@pytest.fixture
def phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("phases", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "phases", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def python(phases: ModuleType, name: str, code: str):
    return phases.Phase(name, [sys.executable, "-c", code], {"ADDED": "here"})


def test_each_phase_has_its_outcome_and_log(phases: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    outcomes = phases.run_together(
        [
            python(phases, "good", "import os; print('said', os.environ['ADDED'])"),
            python(phases, "bad", "print('why'); raise SystemExit(3)"),
            python(phases, "slow", "import time; time.sleep(60)"),
            phases.Phase("missing", ["no-such-command"]),
        ],
        seconds=2,
    )
    assert time.monotonic() - begin < 30
    assert [o.name for o in outcomes] == ["good", "bad", "slow", "missing"]
    results = [o.result for o in outcomes]
    assert results[:3] == ["ok", "failed with status 3", "took more than 2 s"] and "no-such-command" in results[3]
    assert (phases.LOGS / "good.log").read_text() == "said here\n"
    assert "why" in capsys.readouterr().out
    assert [line.split()[0] for line in phases.table(outcomes).splitlines()] == ["good", "bad", "slow", "missing"]


def test_a_failure_stops_nothing_but_shows(
    phases: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    build = python(phases, "build", "raise SystemExit(1)")
    checks = [python(phases, "tests", "pass"), python(phases, "memcheck", "pass")]
    monkeypatch.setattr(phases, "building", lambda: build)
    monkeypatch.setattr(phases, "checks", lambda: checks)
    monkeypatch.setattr(phases, "RESULTS", [tmp_path / "absent.json"])
    monkeypatch.setattr(phases.sys, "executable", "true")  # the bench
    assert phases.main() == 1
    last = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[0] for line in last] == ["build", "tests", "memcheck", "bench", "whole"]
    assert sorted(p.name for p in tmp_path.glob("*.log")) == ["bench.log", "build.log", "memcheck.log", "tests.log"]


def test_phases_of_a_machine_without_tools(phases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(phases.shutil, "which", lambda name: None)
    assert phases.building().environment["BN_EXT_CUDA"] == "1"
    assert [phase.name for phase in phases.checks()] == ["tests", "memcheck", "racecheck", "synccheck"]
