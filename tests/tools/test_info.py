"""``python -m bn_ext`` says what is built and what runs, and fails where results are wrong."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

import bn_ext
from bn_ext import _build_info
from bn_ext.tools import info


def test_command() -> None:
    run = subprocess.run([sys.executable, "-m", "bn_ext"], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = dict(line.split("  ", 1) for line in run.stdout.splitlines() if "  " in line)
    assert lines["bn_ext"].strip() == f"{bn_ext.__version__}, commit {_build_info.commit}"
    assert lines["torch"].strip() == torch.__version__
    assert platform.python_version() in lines["Python"]
    assert "right on cpu" in lines["self-check"]
    assert "paste these lines" in run.stdout


@pytest.mark.parametrize("result", ["output", "running_var"])
def test_wrong_results_fail(result: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = bn_ext.functional.batch_norm

    def wrong(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, *rest, **options) -> torch.Tensor:
        y = right(x, mean, var, *rest, **options)
        if result == "output":
            return y * (1 + 20 * torch.finfo(y.dtype).eps)
        var += 1e-5
        return y

    monkeypatch.setattr(bn_ext.functional, "batch_norm", wrong)
    assert info.main() == 1
    printed = capsys.readouterr().out
    assert f"channels_last, training: {result} is off by" in printed
    assert "right" not in printed


def test_a_crash_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def crash(*_, **__) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(bn_ext.functional, "batch_norm", crash)
    assert info.main() == 1
    assert "cpu: RuntimeError: no kernel image" in capsys.readouterr().out


def test_random_state_is_left_alone(capsys: pytest.CaptureFixture) -> None:
    before = torch.get_rng_state()
    info.main()
    assert torch.equal(torch.get_rng_state(), before)
