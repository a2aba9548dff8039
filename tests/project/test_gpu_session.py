"""The plugin of `make gpu`, on a stub of torch: bad tests cost their own results alone, what is left out is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """\
class cuda:
    poisoned = False
    def is_initialized(): return True
    def synchronize():
        if cuda.poisoned: raise RuntimeError("an illegal memory access was encountered")
"""
TESTS = """\
import ctypes, torch, pytest
def test_before(): pass
def test_bad():
    torch.cuda.poisoned = True
    assert False, "why"
def test_between(): pass
def test_unnoticed(): torch.cuda.poisoned = True
def test_merely_wrong(): assert False
@pytest.mark.parametrize("n", [1, 2])
def test_skipped(n): pytest.skip("no second GPU")
def test_hangs(): ctypes.PyDLL(None).sleep(60)  # and keeps the GIL
def test_after(): pass
"""
GOOD = {"test_before", "test_between", "test_after"}


@pytest.fixture
def session(tmp_path: Path):
    """Runs pytest as `make gpu` does, on those tests; gives its status and output."""
    (tmp_path / "torch.py").write_text(STUB)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_stub.py").write_text(TESTS)
    (tmp_path / "tests" / "test_missing.py").write_text("import no_such_package.part\ndef test(): pass\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "BN_EXT_TESTS_BEGUN": "", "BN_EXT_TESTS_LONGEST": "2"}

    def run(*options: str, begun: Path | None = None) -> tuple[int, str]:
        options = ("-v", "-p", "no:cacheprovider", "-p", "gpu_session", "-c", "/dev/null", *options)
        command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), "tests"]
        env = environment | ({"BN_EXT_TESTS_BEGUN": str(begun)} if begun else {})
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def passed(output: str) -> set[str]:
    return {name for names in re.findall(r"::(\w+) PASSED|PASSED \S+::(\w+)", output) for name in names}


def test_a_new_run_takes_what_is_left(session, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    statuses, outputs = zip(*(session(begun=begun) for _ in range(4)), strict=True)
    assert statuses == (os.EX_TEMPFAIL, os.EX_TEMPFAIL, -signal.SIGALRM, 0)
    assert "assert False" in outputs[0] and "test_bad left an error on the GPU: an illegal memory" in outputs[0]
    assert "test_unnoticed left an error on the GPU" in outputs[1]
    assert "in test_hangs" in outputs[2], "where it hung"
    assert "test_hangs" not in outputs[3]
    assert passed("".join(outputs)) >= GOOD


def test_another_worker_takes_what_is_left(session) -> None:
    pytest.importorskip("xdist")
    status, output = session("-n", "1")
    assert status == 1
    assert passed(output) >= GOOD
    assert "FAILED tests/test_stub.py::test_merely_wrong" in output and "crashed while running" in output


def test_what_is_left_out_is_said(session) -> None:
    status, output = session("-k", "skipped or before")
    assert status == 0
    lines = [line for line in output.splitlines() if line.startswith("left out: ")]
    assert lines == [
        "left out: tests/test_missing.py: there is no no_such_package",
        "left out: tests/test_stub.py::test_skipped: no second GPU",
    ]


def test_what_is_missing_of_our_own_is_an_error(session, tmp_path: Path) -> None:
    (tmp_path / "tests" / "test_missing.py").write_text("import bench.no_such_module\n")
    status, output = session("--continue-on-collection-errors", "-k", "before")
    assert status == 1 and "No module named" in output
