"""The measurement on a GPU, in all that needs none: sets past the cache, rows, tables, targets, ncu's report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench is no part of the installed package

from bench import gpu, gpu_report, measure, peers, problems, record, report, timing, traffic, training

ROOT = Path(__file__).parents[1]
SHAPE = "2x4x5x5"
CASE = (SHAPE, "contiguous", "float32", "bn")
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "l2_bytes": 500, "driver": "1.2", "cuda": "13.0", "cudnn": 9}


@pytest.fixture(scope="module")
def no_gpu() -> Iterator[None]:
    """The CPU in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICE", "cpu")
        patch.setattr(gpu, "machine", lambda: MACHINE)
        patch.setattr(gpu, "timed", partial(timing.interleave, shortest=0))
        patch.setattr(gpu, "TRAINED", {**gpu.TRAINED, "shape": "16x3x64x64", "width": 4})
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, no_gpu: None) -> Path:
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.mktemp("bench") / "gpu.json"
    options = ["--shapes", SHAPE, "--peers", "cuDNN", "--seconds", "0", "--rounds", "2", "--out", str(path)]
    assert gpu.main(options) == 0
    return path


def test_data_file_is_complete(recorded: Path) -> None:
    data = json.loads(recorded.read_text())
    assert data["machine"] == MACHINE
    assert data["settings"]["cases_left_for_want_of_time"] == 0
    trained = [row for row in data["rows"] if row["pass"] == training.PASS]
    assert [row["peer"] for row in trained] == [peers.BASELINE, peers.OURS, "cuDNN"]
    assert all(row["status"] == "ok" for row in trained)
    rows = [row for row in data["rows"] if row["pass"] in problems.PASSES]
    assert (
        len(rows) == len(problems.BLOCKS) * len(problems.LAYOUTS) * len(gpu.GRID["dtypes"]) * len(problems.PASSES) * 4
    )
    for row in rows:
        if row["peer"] == peers.OURS:
            assert row["status"] == "ok" and row["over_best"] > 0 and row["best"] == peers.BASELINE
            assert row["on_chip"] == (row["pass"] != "inference")
            sets = gpu.sets_past(500, 200 * (4 if row["dtype"] == "float32" else 2))
            assert row["calls"] == sets
        elif row["peer"] == "cuDNN":
            assert row["status"] == "unavailable" and "cuDNN" in row["reason"]


def test_report_renders(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*gpu_report.MARKS))
    assert gpu_report.main(["--data", str(recorded), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "geometric mean, batch norm + add + ReLU" in text and "| ResNet-50, 16×3×64×64 NHWC, bfloat16 |" in text
    assert "old" not in text and "| 2×4×5×5 NHWC |" in text and "NVIDIA H100 80GB HBM3" in text
    assert recorded.with_suffix(".png").stat().st_size > 0
    assert gpu_report.main(["--data", str(recorded)]) == 0
    verdicts = capsys.readouterr().out.splitlines()[-len(gpu_report.TARGETS) :]
    assert all(line.startswith(("ok", "short")) for line in verdicts)
    assert " at 2×4×5×5 " in verdicts[-1]


def row(**fields: object) -> measure.Row:
    usual = {
        "block": "bn",
        "shape": SHAPE,
        "layout": "contiguous",
        "dtype": "float32",
        "pass": "forward",
        "peer": peers.OURS,
    }
    return {**usual, "status": "ok", "on_chip": True, **fields}


def test_targets_count_what_fits_on_chip() -> None:
    rows = [row(of_copy=0.9), row(of_copy=0.8), row(of_copy=0.1, on_chip=False)]
    rows += [row(**{"pass": "both"}, over_best=2.0), row(**{"pass": "both"}, over_best=0.9, layout="channels_last")]
    results = report.Results({"machine": {}, "versions": {}, "rows": rows})
    lines = [target.judge(results)[1] for target in gpu_report.TARGETS]
    assert lines[0].startswith("short") and "0.849" in lines[0]
    assert lines[1].endswith("not measured")
    assert lines[2].startswith("short") and "1.342" in lines[2]
    assert lines[3].startswith("short") and "2×4×5×5 NHWC, both, float32" in lines[3]


def test_rate_of_a_copy() -> None:
    copies = [row(peer=measure.COPY, median_ms=1e-6), row(peer=measure.COPY, median_ms=2e-6, dtype="float16")]
    results = report.Results({"machine": {}, "versions": {}, "rows": copies})
    assert gpu_report.copy_rate(results) == pytest.approx(2 * 200 * 4 / 1e-9)


@pytest.mark.parametrize(
    ("tensor", "sets"), [(1, 100), (33, 4), (50, 2), (51, 2), (99, 2), (100, 2), (101, 2), (10**6, 2)]
)
def test_sets_past_the_cache(tensor: int, sets: int) -> None:
    assert gpu.sets_past(50, tensor) == sets
    assert sets * tensor >= 2 * 50


def test_every_set_is_another_tensor_of_the_same_kind() -> None:
    problem = problems.Problem(SHAPE, "channels_last", "float16", "bn+add+relu", sets=3)
    inputs = [x for xs in (problem.inputs, *(xs for xs, _ in problem.others)) for x in xs]
    assert len({x.data_ptr() for x in inputs}) == 6
    assert all(x.stride() == problem.input.stride() and x.dtype == torch.float16 for x in inputs)
    assert not torch.equal(inputs[0], inputs[1])


def test_results_of_one_turn_are_all_kept() -> None:
    """Or the second would be written where the cache still has the first."""
    turn = measure._one_by_one([lambda: torch.empty(1000)] * 3)
    assert len({t.data_ptr() for t in turn()}) == 3


def test_seconds_are_of_one_call(no_gpu: None) -> None:
    """A turn over four sets takes four times as long as is reported."""
    problem = problems.Problem(SHAPE, "contiguous", "float32", sets=4)

    def clock(calls: dict, seconds: float, rounds: int) -> tuple[dict[str, list[float]], int]:
        return {name: [4.0, 4.0] for name in calls}, 1

    rows = measure.measure(problem, measure.build(problem, ()), "both", 0, 2, clock)
    assert {r["median_ms"] for r in rows} == {1000.0} and {r["calls"] for r in rows} == {4}


class FakeGpu:
    """Events and sleep of a GPU on which a call takes 3 ms, and that sleeps as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: float) -> None:
        self.awake = self.now = 0.0  # when the sleep ends, and the host's time
        self.host = host  # seconds to queue a call
        self.slept: list[float] = []
        monkeypatch.setattr(gpu.torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(gpu.torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(gpu, "perf_counter", lambda: self.now)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / gpu.GpuClock.CYCLES)
        self.awake = self.now + self.slept[-1]

    def call(self) -> None:
        self.now += self.host

    def query(self) -> bool:
        return self.now >= self.awake

    def elapsed_time(self, end: object) -> float:
        return 3.0

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


@pytest.mark.parametrize(("host", "attempts"), [(1e-4, 1), (5e-3, 2)])
def test_clock_tries_again_when_the_host_was_late(host: float, attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeGpu(monkeypatch, host), gpu.GpuClock()
    call = fake.call
    assert clock.sample(call, 1) == pytest.approx(3e-3)
    assert len(fake.slept) == attempts
    clock.sample(call, 1)
    assert len(fake.slept) == attempts + 1
    assert fake.slept[-1] == pytest.approx(clock.MARGIN * host)


def test_time_that_is_up_ends_the_grid(no_gpu: None) -> None:
    options = gpu.arguments(["--shapes", SHAPE, "--peers", "--seconds", "0", "--rounds", "2"])
    cases = [CASE]
    assert list(gpu.run_blocks(cases, options, MACHINE, end=0)) == []
    assert len(list(gpu.run_blocks(cases, options, MACHINE, end=float("inf")))) == len(problems.PASSES)


def test_part_of_the_grid_does_not_replace_the_record() -> None:
    assert gpu.arguments([]).out == gpu.RECORD
    assert len(gpu.arguments([]).shapes) == 2 * len(problems.RESNET)
    for part in (["--shapes", SHAPE], ["--dtypes", "float16"], ["--peers"], ["--layouts", "contiguous"]):
        assert gpu.arguments(part).out == record.PARTIAL


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA T400", None),
    ],
)
def test_limits_by_name(name: str, limits: str | None) -> None:
    assert gpu.limits_of(name) == limits
    if limits:
        assert gpu.plan_of(CASE, "forward", limits).strategy == "small"


def test_nothing_fits_on_a_chip_that_is_not_known() -> None:
    assert gpu.on_chip(CASE, "both", "h100")
    assert not gpu.on_chip(CASE, "both", None)


# ---------------------------------------------------------------------------------------------- traffic

HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'


def ncu_line(launch: int, metric: str, value: str) -> str:
    return f'"{launch}","7","batch_norm_kernel","Command line profiler metrics","{metric}","byte","{value}"'


def test_traffic_of_each_launch() -> None:
    lines = ["==PROF== Connected to process 7", HEAD]
    for launch, (read, write) in enumerate([("1,000", "500.0"), ("2,000,000", "1")]):
        lines += [ncu_line(launch, "dram__bytes_read.sum", read), ncu_line(launch, "dram__bytes_write.sum", write)]
    assert traffic.moved("\n".join(lines)) == [1500, 2000001]
    text = traffic.table([CASE], [1500, 2400], "h100")
    assert "| 2×4×5×5 NCHW | float32 | backward | small, block | 0.0 | 0.0 | 1.00 |" in text
    with pytest.raises(SystemExit, match="ncu measured nothing"):
        traffic.moved("==ERROR== no permission")
