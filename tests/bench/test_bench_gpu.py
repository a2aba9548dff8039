"""The measurement on a GPU, in all that needs none: sets past the cache, rows, tables, targets."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is no part of the installed package

from bench import (
    gpu,
    gpu_clock,
    gpu_plan,
    gpu_report,
    kernelbench,
    measure,
    memory,
    peers,
    record,
    report,
    workloads,
)
from bn_ext.tools import timing

ROOT = Path(__file__).parents[2]
SHAPE = "2x4x5x5"
CASE = (SHAPE, "contiguous", "float32", "bn")
MACHINE = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "l2_bytes": 500,
    "copy_bytes_per_second": 1e9,
    "driver": "1.2",
    "cuda": "13.0",
    "cudnn": 9,
}
SHORT = ["--seconds", "0", "--rounds", "2"]


@pytest.fixture(scope="module")
def no_gpu() -> Iterator[None]:
    """The CPU in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICE", "cpu")
        patch.setattr(gpu, "machine", lambda: MACHINE)
        patch.setattr(gpu, "timed", lambda *of, late: timing.interleave(*of, shortest=0))
        patch.setattr(gpu, "TRAINED", {**gpu.TRAINED, "shape": "16x3x64x64", "width": 8})
        patch.setattr(gpu, "TRAINING", 0.0)
        patch.setattr(gpu, "LONGEST", 300.0)
        patch.setattr(kernelbench, "SHAPE", "3x4x9x9")
        yield


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, no_gpu: None) -> list[Path]:
    """The data files of all parts but Inductor's, whose compilation takes long."""
    folder = tmp_path_factory.mktemp("bench")
    files = [folder / f"{part}.json" for part in gpu.PARTS if part != "inductor"]
    for file in files:
        assert gpu.main([file.stem, "--shapes", SHAPE, "--peers", "cuDNN", *SHORT, "--out", str(file)]) == 0
    return files


def test_data_files_are_complete(recorded: list[Path]) -> None:
    core, fused, trained = (json.loads(path.read_text()) for path in recorded)
    assert [data["machine"] for data in (core, fused, trained)] == [MACHINE] * 3
    assert [data["settings"]["cases_left"] for data in (core, fused, trained)] == [0, 0, 0]
    assert [row["peer"] for row in trained["rows"]] == [peers.BASELINE, peers.OURS, "cuDNN"]
    assert all(row["status"] == "ok" for row in trained["rows"])
    each = len(workloads.LAYOUTS) * 2 * 2 * 4  # dtypes, passes, peers and the copy
    assert len(core["rows"]) == each + 4 and len(fused["rows"]) == 3 * each + 2 * 2 * len(workloads.LAYOUTS)
    assert {row["pass"] for row in core["rows"]} == {"forward", "backward"}
    assert {row["pass"] for row in fused["rows"]} == {"both", "inference", memory.PASS}
    for row in core["rows"] + [row for row in fused["rows"] if row["pass"] in workloads.PASSES]:
        if row["peer"] == peers.OURS:
            assert row["status"] == "ok" and row["over_best"] > 0 and row["best"] == peers.BASELINE
            assert row["on_chip"] == (row["pass"] != "inference") and row["of_copy"] > 0
            assert row["plan"].startswith("elementwise, block" if row["pass"] == "inference" else "small, block")
        if row["peer"] == peers.OURS and row["shape"] == SHAPE:
            tensor = 200 * (4 if row["dtype"] == "float32" else 2)
            assert row["calls"] == gpu_clock.sets_past(500, tensor)
            least = tensor * workloads.LEAST_MOVES[row["pattern"]][row["pass"]]
            assert row["bytes_per_second"] == pytest.approx(1e3 * least / row["median_ms"], rel=1e-3)
            assert row["over_bound_us"] == pytest.approx(1e3 * row["median_ms"] - 1e6 * least / 1e9, abs=0.1, rel=1e-3)
        elif row["peer"] == "cuDNN":
            assert row["status"] == "unavailable" and "cuDNN" in row["reason"]


def test_what_is_worth_most_comes_first(recorded: list[Path]) -> None:
    rows = json.loads(recorded[0].read_text())["rows"]
    assert list(dict.fromkeys(row["dtype"] for row in rows)) == ["bfloat16", "float32"]
    assert sorted(f"32x{shape}" for shape in gpu.BY_VALUE) == sorted(workloads.RESNET)
    first = gpu.cases_of(gpu.arguments(["core"]))[:3]
    case = ("256x256x56x56", "channels_last", "bfloat16", "bn")
    assert first == [(case, "forward"), (case, "backward"), (("256x256x56x56", "contiguous", *case[2:]), "forward")]


def test_nothing_is_compiled_before_inductors_part() -> None:
    assert [part for part in gpu.PARTS if "Inductor" in gpu.PARTS[part].peers] == ["inductor", "training"]


def test_problem_of_kernelbench(recorded: list[Path], no_gpu: None) -> None:
    workload = kernelbench.Problem33("8x4x64x64", "cpu", sets=2)
    for input in (workload.input, workload.others[0][0][0]):
        assert input.mean().item() == pytest.approx(5, abs=0.1) and input.std().item() == pytest.approx(3, abs=0.1)
    expected = workload.expected["forward"]
    module = torch.nn.BatchNorm2d(4).double()
    torch.testing.assert_close(expected["output"], module(workload.input.double()), rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(expected[name], getattr(module, name), rtol=1e-9, atol=1e-9)
    rows = [row for row in json.loads(recorded[0].read_text())["rows"] if row["pattern"] == kernelbench.NAME]
    assert [row["peer"] for row in rows] == [measure.COPY, peers.BASELINE, peers.OURS, "cuDNN"]
    assert rows[2]["error_per_channel"] > 0 and rows[2]["shape"] == kernelbench.SHAPE


def test_running_statistics_of_kernelbench_are_compared(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = kernelbench.Problem33.expected.func

    def off(workload: kernelbench.Problem33) -> dict:
        results = expected(workload)
        results["forward"]["running_var"] += 1e-3
        return results

    monkeypatch.setattr(kernelbench.Problem33, "expected", property(off))
    (task,) = gpu.run_kernelbench(gpu.arguments(["core", *SHORT]), MACHINE)
    found = {row["peer"]: row for row in gpu.attempted(task)}
    assert found[peers.OURS]["status"] == "wrong" and "running_var" in found[peers.OURS]["reason"]


def test_report_renders(recorded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*gpu_report.MARKS))
    data = ["--data", *map(str, recorded)]
    assert gpu_report.main([*data, "--page", str(readme)]) == 0
    text = readme.read_text()
    assert "geometric mean, batch norm + add + ReLU" in text and "| ResNet-50, 16×3×64×64 NHWC, bfloat16 |" in text
    assert "old" not in text and "| 2×4×5×5 NHWC |" in text and "NVIDIA H100 80GB HBM3" in text
    assert recorded[0].with_name("gpu.png").stat().st_size > 0
    capsys.readouterr()
    assert gpu_report.main(data) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = [line for line in lines if line.startswith(("ok", "short"))]
    assert len(verdicts) == len(gpu_report.TARGETS) and " at 2×4×5×5 " in verdicts[-1]
    rates = lines[lines.index("| --- | --- | --- | --- | --- | --- | --- |") + 1 :]
    assert len(rates) == 8 + 1 + 24
    assert rates[0].startswith("| 2×4×5×5 NHWC, bfloat16, forward | ") and rates[0].endswith(
        "| small, block, 1 x 1 blocks, slabs: 1 |"
    )
    assert sum(line.startswith("| KernelBench 1/33, 3×4×9×9 NCHW") for line in rates) == 1


def test_report_of_what_there_is(recorded: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of batch norm alone; then no matplotlib."""
    assert gpu_report.main(["--data", str(recorded[-1])]) == 0
    assert "left out: the picture: nothing was measured" in capsys.readouterr().out
    empty = tmp_path / "empty.json"
    record.write(empty, {**json.loads(recorded[0].read_text()), "rows": []})
    assert gpu_report.main(["--data", str(empty)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        assert gpu_report.main(["--data", str(recorded[0])]) == 0
    assert "left out: the picture: import of matplotlib halted" in capsys.readouterr().out


def test_files_are_put_together(recorded: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a case in several files, with all the peers of the one that has most."""
    core = json.loads(recorded[0].read_text())
    more = [{**row, "peer": f"{row['peer']} again"} for row in core["rows"][:4]] + core["rows"][:4]
    fewer = core["rows"][:3]
    files = [tmp_path / f"{name}.json" for name in ("one", "two", "three")]
    for file, rows in zip(files, (core["rows"], more, fewer), strict=True):
        record.write(file, {**core, "rows": rows})
    data = gpu_report.merged(files)
    assert data["machine"] == MACHINE and data["rows"] == [*more, *core["rows"][4:]]
    monkeypatch.setattr(gpu_report, "RECORD", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_report, "picture", lambda results, path: None)
    assert gpu_report.main(["--data", *map(str, files), "--record"]) == 0
    assert json.loads((tmp_path / "gpu.json").read_text()) == data


def row(**fields: object) -> measure.Row:
    usual = {
        "pattern": "bn",
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


def test_late_samples_show() -> None:
    figures = {"bytes_per_second": 2e9, "of_copy": 0.5, "over_bound_us": 1.0, "plan": "small"}
    rows = [row(**figures, late=late) for late in (0, 2)]
    lines = gpu_report.rates_table(report.Results({"machine": {}, "versions": {}, "rows": rows})).splitlines()
    assert ["| 2* |" in line for line in lines[2:]] == [False, True]


def test_rate_of_a_copy() -> None:
    copies = [row(peer=measure.COPY, median_ms=1e-6), row(peer=measure.COPY, median_ms=2e-6, dtype="float16")]
    results = report.Results({"machine": {}, "versions": {}, "rows": copies})
    assert gpu_report.copy_rate(results) == pytest.approx(2 * 200 * 4 / 1e-9)


@pytest.mark.parametrize(
    ("tensor", "sets"), [(1, 100), (33, 4), (50, 2), (51, 2), (99, 2), (100, 2), (101, 2), (10**6, 2)]
)
def test_sets_past_the_cache(tensor: int, sets: int) -> None:
    assert gpu_clock.sets_past(50, tensor) == sets
    assert sets * tensor >= 2 * 50


def test_every_set_is_another_tensor_of_the_same_kind() -> None:
    workload = workloads.Workload(SHAPE, "channels_last", "float16", "bn+add+relu", sets=3)
    inputs = [x for xs in (workload.inputs, *(xs for xs, _ in workload.others)) for x in xs]
    assert len({x.data_ptr() for x in inputs}) == 6
    assert all(x.stride() == workload.input.stride() and x.dtype == torch.float16 for x in inputs)
    assert not torch.equal(inputs[0], inputs[1])


def test_results_of_one_turn_are_all_kept() -> None:
    """Or the second would be written where the cache still has the first."""
    turn = measure._one_by_one([lambda: torch.empty(1000)] * 3)
    assert len({t.data_ptr() for t in turn()}) == 3


def test_seconds_are_of_one_call(no_gpu: None) -> None:
    """A turn over four sets takes four times as long as is reported."""
    workload = workloads.Workload(SHAPE, "contiguous", "float32", sets=4)

    def clock(calls: dict, seconds: float, rounds: int) -> tuple[dict[str, list[float]], int]:
        return {name: [4.0, 4.0] for name in calls}, 1

    rows = measure.measure(workload, measure.build(workload, ()), "both", 0, 2, clock)
    assert {r["median_ms"] for r in rows} == {1000.0} and {r["calls"] for r in rows} == {4}


@pytest.mark.parametrize("wrong", [0.0, 1e-2])
def test_ours_is_judged_without_a_baseline(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline may not run here, or give its results other strides than the input has."""

    def planar(workload: workloads.Workload) -> peers.Peer:
        peer = peers.aten(workload)
        return replace(peer, train=lambda *inputs: peer.train(*inputs).contiguous())

    def off(workload: workloads.Workload) -> peers.Peer:
        peer = peers.ours(workload)
        return replace(peer, train=lambda *inputs: peer.train(*inputs) + wrong)

    monkeypatch.setitem(peers.PEERS, peers.BASELINE, planar)
    monkeypatch.setitem(peers.PEERS, peers.OURS, off)
    workload = workloads.Workload(SHAPE, "channels_last", "float32")
    found = {row["peer"]: row for row in measure.measure(workload, measure.build(workload, ()), "forward", 0, 2)}
    assert found[peers.BASELINE]["status"] == "wrong" and "strides" in found[peers.BASELINE]["reason"]
    assert found[peers.OURS]["status"] == ("wrong" if wrong else "ok")
    assert ("of_copy" in found[peers.OURS]) == (not wrong)


class FakeGpu:
    """Events and sleep of a GPU on which a call takes 3 ms, and that sleeps as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, host: float) -> None:
        self.awake = self.now = 0.0  # when the sleep ends, and the host's time
        self.host = host  # seconds to queue a call
        self.slept: list[float] = []
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(gpu_clock, "perf_counter", lambda: self.now)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles / gpu_clock.GpuClock.CYCLES)
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
    fake, clock = FakeGpu(monkeypatch, host), gpu_clock.GpuClock()
    call = fake.call
    assert clock.sample(call, 1) == pytest.approx(3e-3)
    assert len(fake.slept) == attempts
    clock.sample(call, 1)
    assert len(fake.slept) == attempts + 1
    assert fake.slept[-1] == pytest.approx(clock.MARGIN * host)


def test_samples_that_stay_late_are_counted(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes four times as long with every call: twice as long as the GPU slept."""
    fake = FakeGpu(monkeypatch, 1.0)

    def call() -> None:
        fake.call()
        fake.host *= 4

    late: Counter[str] = Counter()
    gpu_clock.timed({"slow": call}, 0, 2, late)
    assert late == {"slow": 2 + timing.WARM_UP} and len(fake.slept) == late["slow"] * gpu_clock.GpuClock.ATTEMPTS

    def timed(calls: dict, seconds: float, rounds: int, late: Counter[str]) -> tuple[dict[str, list[float]], int]:
        late[peers.OURS] += 3
        return timing.interleave(calls, seconds, rounds, shortest=0)

    monkeypatch.setattr(gpu, "timed", timed)
    (task,) = gpu.run_patterns([(CASE, "forward")], gpu.arguments(["core", *SHORT, "--peers"]), MACHINE, float("inf"))
    assert {row["peer"]: row["late"] for row in gpu.attempted(task)} == {"copy": 0, "ATen": 0, "bn_ext": 3}


def test_copy_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_clock, "COPIED", 1 << 12)
    FakeGpu(monkeypatch, 0)
    assert gpu_clock.copy_rate("cpu") == pytest.approx(2 * (1 << 12) / (3e-3 / 5))


def test_time_that_is_up_ends_the_part(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "core.json"
    options = ["core", "--shapes", SHAPE, "--peers", *SHORT, "--out", str(out)]
    assert gpu.main([*options, "--within", "0"]) == 0
    assert "left out: 8 of 8 cases: the time was up" in capsys.readouterr().out
    assert {row["pattern"] for row in record.rows_of(out)} == {kernelbench.NAME}, "for which time is kept"
    assert gpu.main([*options, "--resume"]) == 0
    assert "left out" not in capsys.readouterr().out
    rows = record.rows_of(out)
    assert [row["peer"] for row in rows if row["pattern"] == kernelbench.NAME].count(peers.OURS) == 1
    assert len(rows) == 3 + 8 * 3


def test_an_error_that_persists_ends_the_process(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what was measured on disk, the case that ended it too, so that another process goes on behind it."""
    out = tmp_path / "core.json"
    options = ["core", "--sections", "patterns", "--shapes", SHAPE, "--peers", *SHORT, "--out", str(out), "--resume"]
    done = iter([None, None, RuntimeError("an illegal memory access was encountered\nmore")])

    def synchronize() -> None:
        if error := next(done, None):
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu.main(options) == os.EX_TEMPFAIL
    printed = capsys.readouterr()
    assert "an illegal memory access" in printed.err and "left out: 5 of 8 cases" in printed.out
    assert len(record.rows_of(out)) == 3 * 3
    assert gpu.main(options) == 0
    assert len(record.rows_of(out)) == 8 * 3


def fail(*_: object, **__: object) -> None:
    raise RuntimeError("no more")


@pytest.mark.parametrize("where", ["timed", "Workload"])
def test_what_fails_is_recorded(where: str, no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is timed, while its tensors are made."""
    monkeypatch.setattr(gpu, where, fail)
    (task,) = gpu.run_patterns([(CASE, "forward")], gpu.arguments(["core", "--peers"]), MACHINE, float("inf"))
    (found,) = gpu.attempted(task)
    assert (found["peer"], found["status"], found["reason"]) == (peers.OURS, "unavailable", "RuntimeError: no more")
    assert found["shape"] == SHAPE and found["on_chip"]


@pytest.mark.parametrize(("part", "module", "count"), [("fused", memory, 4), ("training", gpu.training, 2)])
def test_what_fails_as_a_whole_is_recorded(
    part: str, module: ModuleType, count: int, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", fail)
    out = tmp_path / "out.json"
    assert gpu.main([part, "--sections", gpu.PARTS[part].sections[-1], "--shapes", SHAPE, "--out", str(out)]) == 1
    rows = record.rows_of(out)
    assert [row["reason"] for row in rows] == ["RuntimeError: no more"] * count
    assert gpu_report.main(["--data", str(out)]) == 0


def test_memory_that_does_not_suffice(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory, "measure", measured)
    out = tmp_path / "out.json"
    options = ["fused", "--sections", "memory", "--shapes", SHAPE, "--layouts", "contiguous", "--dtypes", "float32"]
    assert gpu.main([*options, "--out", str(out)]) == 0
    said = f"left out: bn+add+relu {SHAPE} contiguous float32 memory bn_ext: the GPU has too little memory"
    assert said in capsys.readouterr().out.splitlines()
    assert record.rows_of(out) == []


def test_nothing_eager_is_measured_twice(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the baseline, by which the compiled ones are judged."""
    measured = []

    def measure(
        network: object, others: Sequence[str], seconds: float, rounds: int, always: Sequence[str]
    ) -> list[measure.Row]:
        measured.append([*always, *others])
        return [{"peer": peer} for peer in measured[-1]]

    monkeypatch.setattr(gpu.training, "measure", measure)
    rows = [row["peer"] for task in gpu.run_training(gpu.arguments(["training"])) for row in gpu.attempted(task)]
    assert measured == [[peers.BASELINE, peers.OURS, "cuDNN"], [peers.BASELINE, "Inductor"]]
    assert rows == [peers.BASELINE, peers.OURS, "cuDNN", "Inductor"]


def test_interrupted(no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, late: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "timed", interrupt)
    assert gpu.main(["core", "--shapes", SHAPE, *SHORT, "--out", str(tmp_path / "core.json")]) == 130


def test_each_part_has_its_file() -> None:
    assert gpu.arguments(["fused"]).out == ROOT / "build" / "gpu" / "fused.json"


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path, whole = tmp_path / "some.json", {"machine": {}, "rows": [row()]}
    record.write(path, whole)

    def half(path: Path, text: str, write: Callable = Path.write_text) -> None:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half)
        record.write(path, {"machine": {}, "rows": [row(), row()]})
    assert json.loads(path.read_text()) == whole


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
    assert gpu_plan.limits_of(name) == limits
    if limits:
        assert gpu_plan.plan_of(CASE, "forward", limits).strategy == "small"


def test_nothing_fits_on_a_chip_that_is_not_known() -> None:
    found = [{"pass": "both", "peer": peers.OURS}]
    (known,) = gpu.noted([dict(found[0])], CASE, MACHINE)
    assert (
        known["on_chip"]
        and known["plan"] == "small, block, 1 x 1 blocks, slabs: 1; small, block, 1 x 1 blocks, slabs: 1"
    )
    (unknown,) = gpu.noted([dict(found[0])], CASE, {**MACHINE, "gpu": "NVIDIA T400"})
    assert not unknown["on_chip"] and unknown["plan"] == "unknown"


@pytest.mark.parametrize("layout", workloads.LAYOUTS)
@pytest.mark.parametrize("pattern", workloads.PATTERNS)
def test_plans_of_a_frozen_backward_move_the_least(pattern: str, layout: str) -> None:
    """And a bit an element where a ReLU follows."""
    (plan,) = gpu_plan.plans_of(("32x64x56x56", layout, "float32", pattern), "frozen", "h100")
    moves = workloads.LEAST_MOVES[pattern]["frozen"] + ("relu" in pattern) / 32
    assert plan.bytes_moved == moves * 4 * 32 * 64 * 56 * 56
    assert plan.strategy == "elementwise"


def test_plan_in_words() -> None:
    plan = gpu_plan.plan_of(("32x512x28x28", "channels_last", "bfloat16", "bn"), "forward", "h100")
    assert (
        gpu_plan.in_words(plan)
        == f"resident, {plan.team}, {plan.teams} x {plan.team_blocks} blocks, slabs: {plan.slabs}"
    )
