"""Everything that a machine with a GPU can tell, offline and in less than ten minutes: build, tests, sanitizers, bench.

``make gpu`` runs it with the python3 and torch that are there. What fails stops nothing that comes after it. Logs go
to build/gpu, the results of the bench to bench/results; all of it also to the folder that ``OUT`` names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu"
RESULTS = [ROOT / "bench" / "results" / name for name in ("gpu.json", "gpu.png")]
WHOLE = 570.0  # seconds; the bench has what is left of them
BUILD, CHECKS = 240.0, 240.0  # seconds at the most
CORES = os.cpu_count() or 1
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass(frozen=True)
class Phase:
    """A command that belongs to the whole, and what is added to its environment."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float


def run(phase: Phase, seconds: float) -> Outcome:
    """Runs it for at most so long, its output into a log of its name; shows the end of that where it fails."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = LOGS / f"{phase.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                phase.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **phase.environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(phase.name, f"failed: {error}", 0)
        try:
            status = process.wait(seconds)
            result = "ok" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            result = f"took more than {seconds:.0f} s"
    outcome = Outcome(phase.name, result, time.monotonic() - begin)
    lines = log.read_text(errors="replace").splitlines()
    shown = lines[-8:] if result == "ok" else lines[-40:]
    print("\n".join([f"--- {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", *shown]), flush=True)
    return outcome


def run_together(phases: Sequence[Phase], seconds: float) -> list[Outcome]:
    with ThreadPoolExecutor(len(phases)) as pool:
        return list(pool.map(lambda phase: run(phase, seconds), phases))


def table(outcomes: Sequence[Outcome]) -> str:
    return "\n".join(f"{o.name:<10} {o.seconds:>5.0f} s  {o.result}" for o in outcomes)


def building() -> Phase:
    """In place, for the GPUs that are there."""
    environment = {"BN_EXT_CUDA": "1", "MAX_JOBS": str(CORES)}
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and shutil.which(query[0]):
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        environment["TORCH_CUDA_ARCH_LIST"] = ";".join(sorted(set(found)))
    return Phase("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], environment)


def checks() -> list[Phase]:
    """Nothing here is timed, so that all of it may run at the same time."""
    workers = min(8, CORES // 2)
    parallel = ["-n", str(workers)] if importlib.util.find_spec("xdist") and workers > 1 else []
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--durations=10", *parallel]
    options = ["--kernel-name", "kns=batch_norm_kernel", "--report-api-errors", "no", "--error-exitcode", "1"]
    sanitized = [sys.executable, "tests/sanitize.py"]
    return [
        Phase("tests", tests, {"OMP_NUM_THREADS": "2"}),
        *(Phase(tool, ["compute-sanitizer", *options, "--tool", tool, *sanitized]) for tool in TOOLS),
    ]


def main() -> int:
    begin = time.monotonic()
    outcomes = [run(building(), BUILD), *run_together(checks(), CHECKS)]
    left = WHOLE - (time.monotonic() - begin)
    bench = [sys.executable, "-m", "bench.gpu", "--within", f"{left - 30:.0f}"]
    outcomes.append(run(Phase("bench", bench), left))
    if out := os.environ.get("OUT"):
        for file in (*LOGS.glob("*.log"), *filter(Path.exists, RESULTS)):
            shutil.copy(file, out)
    print(table([*outcomes, Outcome("whole", "", time.monotonic() - begin)]))
    return 0 if all(o.result == "ok" for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
