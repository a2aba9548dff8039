"""Builds, tests and measures on a machine with a GPU, offline: ``make gpu`` runs this file by the machine's python3.

Phases are named on the command line and run one after the other, each for its time and what those before it left of
theirs. What fails stops nothing that comes after it. At its time's end a command gets SIGINT, later SIGKILL: each
writes what it finds as it finds it. All of it goes to the folder that ``OUT`` names, else to build/gpu: gpu.log, to
which each run adds, a data file of the bench for each phase, profile.csv and gpu.png.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
GRACE = 15.0  # seconds from SIGINT to SIGKILL; what ends by itself is asked to do so as long before its time is up
CORES = os.cpu_count() or 1
LEFT_OUT = "left out: "  # begins a line, of any command, that belongs in the table
AGAIN = (os.EX_TEMPFAIL, -signal.SIGALRM)  # after an error on the GPU that persists, after a hang
SETUPTOOLS = 77  # the oldest that reads pyproject.toml
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it is given, and what is added to its environment. ``{seconds}`` in the command is
    replaced by what there are when it starts. It is run again as long as it ends by one of AGAIN."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    shown: int = 8  # lines of its end


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    left_out: tuple[str, ...] = ()


def unbuildable() -> str:
    """Why nothing can be built here, and so nothing found out; empty if all can."""
    versions = [d.version for d in importlib.metadata.distributions(name="setuptools")][:1]
    if versions and int(versions[0].split(".")[0]) >= SETUPTOOLS:
        return ""
    return f"bn_ext needs setuptools >= {SETUPTOOLS} to be built, here is {versions[0] if versions else 'none'}"


def building() -> Step:
    """In place; what is up to date is not built again. Without a list, which the image may set to all GPUs that it
    knows, torch compiles for the GPUs that are there."""
    environment = {"BN_EXT_CUDA": "1", "MAX_JOBS": str(CORES), "TORCH_CUDA_ARCH_LIST": ""}
    return Step("build", 150, [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment)


def pytest(name: str, seconds: float, longest: float, *options: str) -> Step:
    """The tests for GPUs among these, each for ``longest`` seconds. A process that can do no more is replaced: by
    pytest-xdist, else by a new run of the tests that no run has begun."""
    workers = min(8, CORES // 2)
    environment = {"OMP_NUM_THREADS": str(max(1, CORES // max(workers, 1)))}
    parallel = ["-n", str(workers)]
    if not importlib.util.find_spec("xdist") or workers < 2:
        parallel, environment = [], {"BN_EXT_TESTS_BEGUN": str(ROOT / "build" / f"{name}.begun")}
    environment["BN_EXT_TESTS_LONGEST"] = str(longest)
    plugins = ["-p", "no:cacheprovider", "-p", "gpu_session"]
    how = ["-v", "-m", "gpu", "--tb=short", "--continue-on-collection-errors", *plugins, *parallel]
    command = [sys.executable, "-m", "pytest", *how, *options]
    return Step(name, seconds, command, environment)


def bench(part: str, seconds: float) -> Step:
    out = str(FOLDER / f"{part}.json")
    command = [sys.executable, "-m", "bench.gpu", part, "--within", "{seconds:.0f}", "--out", out, "--resume"]
    return Step(part, seconds, command)


def sanitizer(tool: str, seconds: float) -> Step:
    options = ["--kernel-name", "kns=batch_norm_kernel", "--report-api-errors", "no", "--error-exitcode", "1"]
    command = ["compute-sanitizer", *options, "--tool", tool, sys.executable, "tests/support/sanitize.py"]
    return Step(tool, seconds, command)


def phases() -> dict[str, list[Step]]:
    tests = "tests/cuda/test_gpu.py"
    smoke = [f"{tests}::{name}" for name in ("test_results", "test_graph_of_a_training_step")]
    profile = [sys.executable, "-m", "bench.traffic", str(FOLDER / "profile.csv"), "--within", "{seconds}"]
    return {
        "core": [pytest("smoke", 60, 20, *smoke), bench("core", 240)],
        "tests": [pytest("tests", 205, 100, tests, "tests")],
        "sanitizers": [sanitizer(tool, 35) for tool in TOOLS],
        "profile": [Step("profile", 50, profile, shown=60)],
        "fused": [bench("fused", 85)],
        "inductor": [bench("inductor", 90)],
        "training": [bench("training", 80)],
    }


def report() -> Step:
    """The step that prints the figures of all data files in the folder, whichever phase wrote them."""
    command = [sys.executable, "-m", "bench.gpu_report", "--data", *map(str, sorted(FOLDER.glob("*.json")))]
    return Step("report", 20, command, shown=150)


def end(process: subprocess.Popen[bytes]) -> None:
    """Asks the process, and all that it started, to end, and waits for GRACE."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


def attempt(step: Step, until: float, log: Path) -> tuple[int, str]:
    """The command's status and how it ended, its output at the end of the log."""
    left = max(until - time.monotonic(), 1.0)
    command = [part.format(seconds=left - GRACE) if part.startswith("{seconds") else part for part in step.command]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A group of its own, but no session, in which it might outlive what ends this one; there are no threads.
            preexec_fn=os.setpgrp,  # noqa: PLW1509
        )
    late = False
    try:
        process.wait(left)
    except subprocess.TimeoutExpired:
        late = True
        end(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    status = process.wait()
    if late:
        return status, f"took more than {left:.0f} s"
    return status, "ok" if status == 0 else f"failed with status {status}"


def run(step: Step, until: float, log: Path) -> Outcome:
    """Runs it until that time at most; shows the end of its output."""
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, "left out", 0, (f"there is no {step.command[0]}",))
    begin = time.monotonic()
    print(f"--- {step.name}: {until - begin:.0f} s at most", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        print(f"--- {step.name}", file=file, flush=True)
        start = file.tell()
    status, result = attempt(step, until, log)
    processes = 1
    while status in AGAIN and time.monotonic() < until:
        status, result = attempt(step, until, log)
        processes += 1
    if processes > 1:
        result = f"failed: a hang or an error on the GPU that persists; of {processes} processes the last: {result}"
    lines = log.read_bytes()[start:].decode(errors="replace").splitlines()
    left_out = dict.fromkeys(line.removeprefix(LEFT_OUT) for line in lines if line.startswith(LEFT_OUT))
    outcome = Outcome(step.name, result, time.monotonic() - begin, tuple(left_out))
    shown = lines[-step.shown :] if result == "ok" else lines[-40:]
    print("\n".join([*shown, f"--- {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s"]), flush=True)
    return outcome


def run_all(steps: Iterable[Step], log: Path) -> list[Outcome]:
    """One after the other; what one leaves of its time is for those that follow."""
    outcomes = []
    until = time.monotonic()
    for step in steps:
        until += step.seconds
        outcomes.append(run(step, until, log))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    lines = []
    for o in outcomes:
        lines.append(f"{o.name:<10} {o.seconds:>5.0f} s  {o.result}")
        lines += [f"{'':<10}          left out: {what}" for what in o.left_out]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    known = phases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"of {', '.join(known)}; all unless given")
    names = parser.parse_args(argv).phases or list(known)
    if unknown := set(names) - known.keys():
        parser.error(f"no phase is called {', '.join(sorted(unknown))}")
    if why := unbuildable():
        print(why)
        return 1
    begin = time.monotonic()
    log = FOLDER / "gpu.log"
    for stale in [*ROOT.glob("build/*.begun"), *(FOLDER / f"{name}.json" for name in names)]:
        stale.unlink(missing_ok=True)
    outcomes = run_all([building(), *(step for name in names for step in known[name])], log)
    for unfinished in FOLDER.glob("*.part"):
        unfinished.unlink()
    if any(FOLDER.glob("*.json")):
        outcomes += run_all([report()], log)
    text = table([*outcomes, Outcome("whole", "", time.monotonic() - begin)])
    print(text)
    with log.open("a") as file:
        print(text, file=file)
    return 0 if all(o.result in ("ok", "left out") for o in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and end what runs
    sys.exit(main())
