"""The measurement runs, refuses wrong results, and its report renders. No speed is asserted here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is no part of the installed package

from bench import cpu, measure, peers, problems, record, report

SHAPE = "2x4x5x5"
SHORT = ["--seconds", "0", "--rounds", "2"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of one shape with everyone but Inductor, whose compilation takes long."""
    path = tmp_path_factory.mktemp("bench") / "cpu.json"
    before = torch.get_num_threads()
    try:
        assert cpu.main(["--shapes", SHAPE, "--threads", "1", "--peers", "oneDNN", "--out", str(path), *SHORT]) == 0
    finally:
        torch.set_num_threads(before)
    return path


def test_data_file_is_complete(recorded: Path) -> None:
    data = json.loads(recorded.read_text())
    assert {"cpu", "cores", "caches", "isa"} <= data["machine"].keys()
    assert {"bn_ext", "torch", "python", "compiler", "date"} <= data["versions"].keys()
    rows = data["rows"]
    assert len(rows) == len(problems.LAYOUTS) * len(cpu.GRID["dtypes"]) * len(problems.PASSES) * 4
    for row in rows:
        assert {"shape", "layout", "dtype", "threads", "pass", "peer", "status"} <= row.keys()
        if row["status"] != "ok":
            assert row["reason"]
        elif row["peer"] != measure.COPY:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["speedup"] > 0 and row["over_ours"] > 0 and row["of_copy"] > 0 and row["rounds"] >= 2
    ours = [row for row in rows if row["peer"] == peers.OURS]
    assert all(row["status"] == "ok" for row in ours)


def test_report_renders(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    picture = tmp_path / "cpu.png"
    assert report.main(["--data", str(recorded), "--readme", str(readme), "--picture", str(picture)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and "| 2×4×5×5 NCHW |" in text and "| 2×4×5×5 NHWC |" in text
    assert picture.stat().st_size > 0


def test_targets_are_judged(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--data", str(recorded), "--check"]) == 1  # ResNet's shapes are not there
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report.TARGETS)
    assert lines[0].endswith("not measured") and "to reach 1.0" in lines[3]


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("name", problems.PASSES)
def test_a_peer_with_wrong_results_is_refused(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: problems.Problem) -> peers.Peer:
        right = peers.modules(torch.nn, problem)
        return replace(right, train=lambda x: factor * right.train(x), evaluate=lambda x: factor * right.evaluate(x))

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    problem = problems.Problem(SHAPE, "contiguous", "float32")
    rows = {row["peer"]: row for row in measure.measure(problem, measure.build(problem, ["wrong"]), name, 0, 2)}
    assert rows["wrong"]["status"] == "wrong" and "allowed" in rows["wrong"]["reason"]
    assert "median_ms" not in rows["wrong"]
    assert rows[peers.OURS]["status"] == "ok"


def test_a_peer_that_fails_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(problem: problems.Problem) -> peers.Peer:
        raise RuntimeError("no compiler in /some/secret/place\nand more")

    monkeypatch.setitem(peers.PEERS, "failing", failing)
    problem = problems.Problem("8x4", "contiguous", "float32")
    rows = {row["peer"]: row for row in measure.measure(problem, measure.build(problem, ["failing"]), "forward", 0, 2)}
    assert rows["failing"]["status"] == "unavailable"
    assert rows["failing"]["reason"] == "RuntimeError: no compiler in <path>"


def test_part_of_the_grid_does_not_replace_the_record() -> None:
    assert cpu.arguments([]).out == cpu.RECORD
    for part in (["--quick"], ["--shapes", SHAPE], ["--passes", "forward"], ["--peers"], ["--layouts", "contiguous"]):
        assert cpu.arguments(part).out == record.PARTIAL
