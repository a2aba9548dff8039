"""`make gpu`: every step runs and is accounted for, whatever becomes of the others; what it found is on disk."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ["core", "tests sanitizers", "profile fused inductor training"]  # of the Makefile


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    spec = importlib.util.spec_from_file_location("phases", ROOT / ".ci" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "phases", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 1.0)
    return module


def python(gpu: ModuleType, name: str, code: str, seconds: float = 20, *arguments: str):
    return gpu.Step(name, seconds, [sys.executable, "-c", code, *arguments], {"ADDED": "here"})


def log_of(gpu: ModuleType) -> Path:
    return gpu.FOLDER / "gpu.log"


def test_each_step_has_its_outcome_and_log(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = gpu.run_all(
        [
            python(gpu, "good", "import os; print('said', os.environ['ADDED'])"),
            python(gpu, "bad", "print('why'); raise SystemExit(3)"),
            gpu.Step("missing", 1, ["no-such-command"]),
            python(gpu, "part", "print('left out: 3 cases: no time'); print('is left out: no')"),
        ],
        log_of(gpu),
    )
    assert [o.result for o in outcomes] == ["ok", "failed with status 3", "left out", "ok"]
    lines = log_of(gpu).read_text().splitlines()
    assert lines[:4] == ["--- good", "said here", "--- bad", "why"]
    assert "why" in capsys.readouterr().out
    rows = [" ".join(line.split()) for line in gpu.table(outcomes).splitlines()]
    assert rows == [
        "good 0 s ok",
        "bad 0 s failed with status 3",
        "missing 0 s left out",
        "left out: there is no no-such-command",
        "part 0 s ok",
        "left out: 3 cases: no time",
    ]


def test_time_that_is_up(gpu: ModuleType) -> None:
    """SIGINT first, for what can end by itself and say what it has; SIGKILL for what does not."""
    listens = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    begin = time.monotonic()
    steps = [python(gpu, "listens", listens, 3), python(gpu, "deaf", deaf, 3), python(gpu, "next", "print('there')")]
    outcomes = gpu.run_all(steps, log_of(gpu))
    assert time.monotonic() - begin < 20
    # A step that ends late, on a busy machine, takes from the next one's time.
    assert [re.sub(r"\d+", "?", o.result) for o in outcomes] == ["took more than ? s", "took more than ? s", "ok"]
    assert log_of(gpu).read_text().splitlines() == ["--- listens", "so far", "--- deaf", "deaf", "--- next", "there"]


def test_what_a_step_started_ends_with_it(gpu: ModuleType, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    gpu.run_all([python(gpu, "parent", code)], log_of(gpu))
    time.sleep(2)
    assert not alive.exists()


def test_what_ends_the_whole_ends_its_step(gpu: ModuleType, tmp_path: Path) -> None:
    """SIGTERM, as from a limit on the command: the step, in a group of its own, would go on."""
    script, alive = tmp_path / ".ci" / "gpu.py", tmp_path / "alive"
    script.parent.mkdir()
    script.write_text((ROOT / ".ci" / "gpu.py").read_text())
    build = f"import time, pathlib; print('there'); time.sleep(3); pathlib.Path({str(alive)!r}).touch()"
    (tmp_path / "setup.py").write_text(build)
    whole = subprocess.Popen([sys.executable, str(script), "core"], stdout=subprocess.DEVNULL)
    while not (log_of(gpu).exists() and "there" in log_of(gpu).read_text()):
        time.sleep(0.05)
    whole.terminate()
    assert whole.wait(10) == 128 + signal.SIGTERM
    time.sleep(3.5)
    assert not alive.exists()


def test_time_that_is_left_is_handed_on(gpu: ModuleType) -> None:
    step = python(gpu, "told", "import sys; print(sys.argv[1])", 30, "{seconds:.0f}")
    gpu.run_all([python(gpu, "short", "pass", 100), step], log_of(gpu))
    assert 125 <= int(log_of(gpu).read_text().splitlines()[-1]) <= 129  # all but what ending takes


def test_an_error_that_persists_starts_another_process(gpu: ModuleType, tmp_path: Path) -> None:
    code = "import os, pathlib, sys; p = pathlib.Path(sys.argv[1]); n = len(p.read_text()) if p.exists() else 0\n"
    code += "p.write_text('x' * (n + 1)); sys.exit(os.EX_TEMPFAIL if n < 2 else 0)"
    (outcome,) = gpu.run_all([python(gpu, "poisoned", code, 20, str(tmp_path / "count"))], log_of(gpu))
    assert outcome.result == "failed: a hang or an error on the GPU that persists; of 3 processes the last: ok"
    (hung,) = gpu.run_all([python(gpu, "hung", "import signal; signal.raise_signal(signal.SIGALRM)", 1)], log_of(gpu))
    assert "a hang" in hung.result
    (endless,) = gpu.run_all([python(gpu, "endless", "raise SystemExit(75)", 1)], log_of(gpu))
    assert endless.result.endswith("failed with status 75")


def test_a_failure_stops_nothing_but_shows(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"one": [python(gpu, "one", "raise SystemExit(1)")], "two": [python(gpu, "two", "print('two')")]}
    monkeypatch.setattr(gpu, "phases", lambda: known)
    monkeypatch.setattr(gpu, "building", lambda: python(gpu, "build", "raise SystemExit(1)"))
    assert gpu.main([]) == 1
    table = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["build", "one", "two", "whole"]
    log = log_of(gpu).read_text()
    assert log.splitlines()[-4:] == table
    monkeypatch.setattr(gpu, "building", lambda: python(gpu, "build", "pass"))
    assert gpu.main(["two"]) == 0
    assert log_of(gpu).read_text().startswith(log), "what one command found, the next one leaves"
    with pytest.raises(SystemExit):
        gpu.main(["three"])


def test_three_commands_of_eight_minutes(gpu: ModuleType) -> None:
    known = gpu.phases()
    assert " ".join(COMMANDS).split() == list(known)
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        steps = [gpu.building(), *(step for name in command.split() for step in known[name]), gpu.report()]
        assert sum(step.seconds for step in steps) <= 480
        assert f'PHASES="{command}"' in makefile


def test_the_folder_has_room(gpu: ModuleType) -> None:
    """No more than eight files of all phases, a data file that a killed bench was about to write among them."""
    names = {Path(part).name for steps in gpu.phases().values() for s in steps for part in s.command if "out/" in part}
    assert names == {"core.json", "fused.json", "inductor.json", "training.json", "profile.csv"}
    assert len(names | {"gpu.log", "gpu.png", "core.part"}) <= 8


def test_built_for_the_gpu_that_is_there(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 8.6 9.0 10.0+PTX")
    step = gpu.building()
    code = "import os; print(os.environ['BN_EXT_CUDA'], os.environ['TORCH_CUDA_ARCH_LIST'] or 'what is there')"
    gpu.run_all([gpu.Step("build", 20, [sys.executable, "-c", code], step.environment)], log_of(gpu))
    assert log_of(gpu).read_text().splitlines()[-1] == "1 what is there"


@pytest.mark.parametrize(("found", "builds"), [([], False), (["76.1"], False), (["77.0.1"], True), (["84.2"], True)])
def test_setuptools(
    found: list[str], builds: bool, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too old, it would fail the build and everything after it, of which each took its time."""
    distributions = [SimpleNamespace(version=version) for version in found]
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda name: distributions)
    monkeypatch.setattr(gpu, "phases", lambda: {"one": [python(gpu, "one", "print('one')")]})
    monkeypatch.setattr(gpu, "building", lambda: python(gpu, "build", "pass"))
    assert gpu.main([]) == (0 if builds else 1)
    said = capsys.readouterr().out
    assert log_of(gpu).exists() == builds == ("bn_ext needs setuptools >= 77" not in said)
    assert f'"setuptools>={gpu.SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()


def test_a_machine_without_tools(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    alone = gpu.pytest("tests", 1, 1, "tests")
    assert "-n" not in alone.command and "BN_EXT_TESTS_BEGUN" in alone.environment


def test_a_test_that_hangs_ends_before_its_step(gpu: ModuleType) -> None:
    for step in (step for steps in gpu.phases().values() for step in steps if "pytest" in step.command):
        assert 2 * float(step.environment["BN_EXT_TESTS_LONGEST"]) < step.seconds, "and another has time"


# The bench on a stub of a GPU, on which each process does something bad in place of its fourth measurement.
BENCH = """\
import ctypes, faulthandler, os, signal, sys
from bench import gpu
from bn_ext.tools import timing
out, bad = sys.argv[1:]
measured = 0
def timed(*arguments, late):
    global measured
    measured += 1
    if measured == 4:
        exec(bad)
    return timing.interleave(*arguments, shortest=0)
gpu.DEVICE, gpu.timed, gpu.LONGEST = "cpu", timed, 200
gpu.machine = lambda: {"gpu": "NVIDIA H100", "l2_bytes": 1, "copy_bytes_per_second": 1e9}
faulthandler.register(signal.SIGALRM, chain=True)
options = "--sections patterns --shapes 2x4x5x5 --peers --seconds 0 --rounds 2 --resume --within 300 --out"
sys.exit(gpu.main(["core", *options.split(), out]))
"""


def bench(gpu: ModuleType, bad: str) -> tuple[str, int, dict[tuple[str, ...], dict]]:
    """How a step with that bench ends, the cases that it leaves, and the rows of ours by case."""
    out = gpu.FOLDER / "core.json"
    (outcome,) = gpu.run_all([python(gpu, "core", BENCH, 400, str(out), bad)], log_of(gpu))
    data = json.loads(out.read_text())
    rows = {(r["dtype"], r["layout"], r["pass"]): r for r in data["rows"] if r["peer"] == "bn_ext"}
    assert len(rows) == len(data["rows"]) / 3 or "begun" in {r["status"] for r in rows.values()}
    return outcome.result, data["settings"]["cases_left"], rows


def test_a_bench_that_is_killed_leaves_what_it_measured(gpu: ModuleType) -> None:
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    result, left, rows = bench(gpu, killed)
    assert result == "failed with status -9" and left == 5
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "ok", "begun"]
    assert all({"plan", "on_chip"} <= row.keys() for row in rows.values())
    result, left, rows = bench(gpu, killed)
    assert result == "failed with status -9" and len(rows) == 8, "it went on behind the case that killed the first"
    assert [dtype for dtype, *_ in rows] == ["bfloat16"] * 4 + ["float32"] * 4


def test_a_case_that_hangs_costs_itself_alone(gpu: ModuleType) -> None:
    """In code that keeps the GIL, where nothing of Python's runs: neither a handler of SIGINT nor another thread. The
    case has an alarm set, and what is left until then passes quickly."""
    hangs = "assert 0 < signal.setitimer(signal.ITIMER_REAL, 0.5)[0] <= 200; ctypes.PyDLL(None).sleep(60)"
    result, left, rows = bench(gpu, hangs)
    assert "a hang" in result and "of 3 processes the last" in result and left == 0
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "ok", "begun"] * 2
    log = log_of(gpu).read_text()
    assert "bn 2x4x5x5 contiguous bfloat16 backward: bn_ext begun\n" in log and "in timed" in log
