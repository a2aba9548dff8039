"""The measurement runs, refuses wrong results, and its report renders. No speed is asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no part of the installed package

from bench import cpu, expect, heap, measure, memory, networks, peers, record, report, training, workloads

SHAPE = "2x4x5x5"
SHORT = ["--seconds", "0", "--rounds", "2"]
# Not 4: a channels-last training step of so few channels damages the heap in torch itself (2.13, AMD EPYC).
TINY = {"shape": "4x3x32x32", "width": 8}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of one shape and a tiny network with everyone but Inductor, whose compilation takes long."""
    path = tmp_path_factory.mktemp("bench") / "cpu.json"
    before = torch.get_num_threads()
    options = ["--shapes", SHAPE, "--threads", "1", "--passes", *workloads.PASSES, "--peers", "oneDNN", *SHORT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "NETWORKS", ((18, TINY["shape"], True),))
        patch.setattr(training, "Network", partial(training.Network, width=TINY["width"]))
        try:
            assert cpu.main([*options, "--out", str(path)]) == 0
        finally:
            torch.set_num_threads(before)
    return path


def test_data_file_is_complete(recorded: Path) -> None:
    data = json.loads(recorded.read_text())
    assert {"cpu", "cores", "caches", "isa"} <= data["machine"].keys()
    assert {"bn_ext", "torch", "python", "compiler", "date"} <= data["versions"].keys()
    kinds = len(workloads.LAYOUTS) * len(cpu.GRID["dtypes"])
    rows = [row for row in data["rows"] if row["pass"] in workloads.PASSES]
    assert len(rows) == len(workloads.PATTERNS) * kinds * len(workloads.PASSES) * 4
    assert len([row for row in data["rows"] if row["pass"] == memory.PASS]) == len(workloads.PATTERNS) * kinds * 2
    trained = [row for row in data["rows"] if row["pass"] == training.PASS]
    assert len(trained) == len(workloads.LAYOUTS) * 2
    assert all(row["status"] == "ok" and row["images_a_second"] > 0 for row in trained)
    assert all(row["peak"] > row["kept"] > 0 and row["kept_over"] > 0 and row["peak_over"] > 0 for row in trained)
    assert all(row["bound"] > row["speedup"] for row in trained if row["peer"] == peers.OURS)
    for row in rows:
        assert {"pattern", "shape", "layout", "dtype", "threads", "pass", "peer", "status"} <= row.keys()
        if row["status"] != "ok":
            assert row["reason"]
        elif row["peer"] != measure.COPY:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["speedup"] > 0 and row["over_ours"] > 0 and row["of_copy"] > 0 and row["rounds"] >= 2
    ours = [row for row in rows if row["peer"] == peers.OURS]
    assert all(row["status"] == "ok" and row["over_best"] > 0 and row["best"] != peers.OURS for row in ours)


def test_report_renders(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    picture = tmp_path / "cpu.png"
    assert report.main(["--data", str(recorded), "--page", str(readme), "--picture", str(picture)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n") and text.endswith("<!-- bench:end -->\nafter\n")
    assert "old" not in text and text.count("| 2×4×5×5 NCHW |") == text.count("| 2×4×5×5 NHWC |") == 2
    assert "geometric mean, bfloat16, 1 thread" in text and "ResNet-18, 4×3×32×32 NHWC" in text
    assert "keeps for backward" in text
    assert picture.stat().st_size > 0


@pytest.mark.parametrize("measured", [True, False])
def test_what_to_expect(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool) -> None:
    """Each pattern with mean and range, each network with bound and memory; what is not measured is left out."""
    data = json.loads(recorded.read_text())
    for row in data["rows"]:
        if row["pass"] == "both" and row["peer"] == peers.OURS:
            row |= {"threads": 2, "speedup": 4.0 if row["dtype"] == "float32" else 9.0}
    other = {"shape": "3x4", "speedup": 1.0}
    data["rows"] += [row | other for row in data["rows"] if row["pass"] == "both" and row["layout"] == "contiguous"]
    if not measured:
        data["rows"] = [row for row in data["rows"] if row["pass"] != training.PASS]
    (tmp_path / "users.json").write_text(json.dumps(data))
    page, picture = tmp_path / "page.md", tmp_path / "expect.png"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*expect.MARKS))
    monkeypatch.setattr(expect, "RESNET", (SHAPE, "3x4"))
    files = ["--users", str(tmp_path / "users.json"), "--kept", str(recorded), "--picture", str(picture)]
    assert expect.main([*files, "--page", str(page)]) == 0
    text = page.read_text()
    assert "| batch norm + add + ReLU, NCHW | 2.00× (1.00 to 4.00) |" in text
    assert "| batch norm, NHWC | 4.00× (4.00 to 4.00) |" not in text and "| batch norm, NHWC | 4.00× |" in text
    assert ("| ResNet-18, 4×3×32×32 NHWC | " in text) == measured and "old" not in text
    assert picture.stat().st_size > 0


def test_without_records_nothing_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(expect, "AS_USERS_RUN", tmp_path / "heap-1.json")
    with pytest.raises(SystemExit) as ended:
        expect.main([])
    assert ended.value.code == 2
    assert f"there is no {tmp_path}/heap-1.json: python -m bench --heap default" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "chosen"), [([], "kept"), (["--quick", "--heap", "default"], "default")])
def test_the_heap_is_chosen_before_anything_is_loaded(
    arguments: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert heap.chosen(arguments) == chosen
    started: list[dict[str, str]] = []
    monkeypatch.setattr(heap.os, "execve", lambda _, __, environment: started.append(environment))
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.delenv(heap.GUARD, raising=False)
    heap.restart(chosen)
    of_malloc = {name: value for name, value in started[0].items() if name.startswith("MALLOC_")}
    assert of_malloc == heap.VARIABLES[chosen]
    monkeypatch.setenv(heap.GUARD, chosen)
    heap.restart(chosen)
    assert len(started) == 1


def test_the_record_of_each_heap() -> None:
    for name, path in (("kept", cpu.RECORD), ("default", cpu.AS_USERS_RUN)):
        assert cpu.arguments(["--heap", name]).out == path
        assert cpu.arguments(["--heap", name, "--patterns", "bn"]).out == record.PARTIAL


def test_targets_are_judged(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--data", str(recorded), "--check"]) == 1  # ResNet's shapes are not there
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(report.TARGETS)
    assert lines[0].endswith("not measured") and "to reach 1.0" in lines[3] and "to reach 0.55" in lines[-1]


def test_a_bound_from_above() -> None:
    fields = {"shape": SHAPE, "layout": "contiguous", "dtype": "float32", "pass": memory.PASS, "peer": peers.OURS}
    fields["pattern"] = workloads.PATTERNS[-1]
    for kept in ([0.5, 0.5], [0.5, 0.6]):
        rows = [{**fields, "status": "ok", "kept_over": value} for value in kept]
        reached, line = report.TARGETS[-1].judge(report.Results({"machine": {}, "versions": {}, "rows": rows}))
        assert reached == (max(kept) <= 0.55) and f"{max(kept):.3f}" in line


@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.parametrize("name", workloads.PASSES)
@pytest.mark.parametrize("pattern", workloads.PATTERNS)
def test_a_peer_with_wrong_results_is_refused(
    pattern: str, name: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(workload: workloads.Workload) -> peers.Peer:
        right = peers.torchs(workload)
        return replace(
            right, train=lambda *x: factor * right.train(*x), evaluate=lambda *x: factor * right.evaluate(*x)
        )

    monkeypatch.setitem(peers.PEERS, "wrong", wrong)
    workload = workloads.Workload(SHAPE, "contiguous", "float32", pattern)
    rows = {row["peer"]: row for row in measure.measure(workload, measure.build(workload, ["wrong"]), name, 0, 2)}
    assert rows["wrong"]["status"] == "wrong" and "allowed" in rows["wrong"]["reason"]
    assert "median_ms" not in rows["wrong"]
    assert rows[peers.OURS]["status"] == "ok"


def test_a_peer_that_fails_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(workload: workloads.Workload) -> peers.Peer:
        raise RuntimeError("no compiler in /some/secret/place\nand more")

    monkeypatch.setitem(peers.PEERS, "failing", failing)
    workload = workloads.Workload("8x4", "contiguous", "float32")
    rows = {
        row["peer"]: row for row in measure.measure(workload, measure.build(workload, ["failing"]), "forward", 0, 2)
    }
    assert rows["failing"]["status"] == "unavailable"
    assert rows["failing"]["reason"] == "RuntimeError: no compiler in <path>"


@pytest.mark.parametrize("pattern", workloads.PATTERNS)
def test_a_frozen_backward_reads_no_more_than_is_counted(pattern: str) -> None:
    """Of the input's size nothing but a bit an element, which the least moves leave out."""
    workload = workloads.Workload("4x8x16x16", "contiguous", "float32", pattern)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        peer = peers.ours(workload)
        gradients = peer.call("frozen")()
    assert len(gradients) == len(peer.inputs)
    assert max(kept) <= workload.input.numel() // 8


def test_a_record_without_a_pass_is_read() -> None:
    """A record of an older commit lacks the passes that came after it."""
    results = report.Results(json.loads(cpu.RECORD.read_text()))
    measured = [name for name in workloads.PASSES if name in results.values("pass")]
    heads = report.shapes_table(results, "float32", 2).splitlines()[0]
    assert [name for name in workloads.PASSES if f"| {report.PASS_NAMES.get(name, name)} |" in heads] == measured
    results.rows = [row for row in results.rows if row["pass"] != "frozen"]
    judged = [target.judge(results) for target in report.TARGETS if target.where.get("pass") == "frozen"]
    assert [reached for reached, _ in judged] == [False]
    assert "not measured" in judged[0][1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", workloads.PATTERNS[1:])
def test_gradients_do_not_hang_on_rounding(pattern: str, dtype: str) -> None:
    """However the sum before ReLU was rounded, its gradient is the same."""
    workload = workloads.Workload("8x16x14x14", "contiguous", dtype, pattern)
    low, high = (
        (workload._before_relu(*workloads.reference.statistics(workload.input)) + side > 0) for side in (-1e-3, 1e-3)
    )
    assert torch.equal(workload.dy * low, workload.dy * high) == (dtype == "bfloat16")
    assert (workload.dy == 0).float().mean() < 0.3


def test_what_eager_torch_keeps() -> None:
    """Its input and ReLU's result, which took the place of the sum; at the peak two gradients at the least."""
    workload = workloads.Workload("4x8x32x32", "contiguous", "float32", "bn+add+relu")
    kept, peak = memory.of_pattern(peers.aten(workload))
    assert kept == pytest.approx(2, abs=0.05) and peak >= 3


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11_689_512), (50, 25_557_032)])
def test_networks_are_those_of_the_paper(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = networks.resnet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_a_network_with_wrong_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        model.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        return model

    monkeypatch.setitem(training.PEERS, "wrong", wrong)
    network = training.Network(18, **TINY, layout="channels_last", dtype="float32")
    rows = training.measure(network, others=["wrong"], seconds=0, rounds=2)
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong"]


def test_part_of_the_grid_does_not_replace_the_record() -> None:
    assert cpu.arguments([]).out == cpu.RECORD
    for part in (
        ["--quick"],
        ["--sections", "memory"],
        ["--patterns", "bn"],
        ["--shapes", SHAPE],
        ["--passes", "forward"],
        ["--peers"],
        ["--layouts", "contiguous"],
    ):
        assert cpu.arguments(part).out == record.PARTIAL


def test_make_bench_ends_where_a_process_fails(tmp_path: Path) -> None:
    """With a Python that fails in the second of the five processes."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *-heap-2.json) exit 3;; esac\n')
    python.chmod(0o755)
    for done in ("tools", "built"):
        (tmp_path / done).touch()
    make = ["make", "bench", f"VENV={tmp_path}", f"BIN={tmp_path}"]
    run = subprocess.run(make, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert calls.read_text().splitlines()[-1].endswith("-heap-2.json"), "nothing runs after it"
