"""The core of the suite at every instruction set this CPU has: the level is a process's, so each is a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
ACTIVATIONS = [f"test_activation.py::{name}" for name in ("test_types", "test_shapes", "test_branches")]
OPS = ["test_forward.py", "test_backward.py", "test_numerics.py", "test_determinism.py", *ACTIVATIONS]
CORE = [*(f"ops/{name}" for name in OPS), "cpu/test_bypass.py"]
# An instruction set has its own conversions of half types. Which tensors have that type, and how long a sum is, tests
# at one instruction set cover.
LEFT_OUT = "not bf16-bf16 and not f16-f16 and not test_long_reduction"
AVAILABLE = {"default": True, "avx2": torch.cpu._is_avx2_supported(), "avx512": torch.cpu._is_avx512_supported()}


@pytest.mark.parametrize("level", AVAILABLE)
def test_level(level: str) -> None:
    if not AVAILABLE[level]:
        pytest.skip(f"this CPU has no {level}")
    if level == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip(f"{level} is what this process runs")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": level, "PYTHONPATH": os.pathsep.join(sys.path)}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, cwd=TESTS, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    used = python("-c", "import bn_ext._C; print(bn_ext._C.instruction_set())")
    assert used.stdout.strip() == level.upper(), used.stdout + used.stderr
    run = python("-m", "pytest", "-q", "--tb=line", "-m", "not gpu", "-p", "no:cacheprovider", "-k", LEFT_OUT, *CORE)
    assert run.returncode == 0, "\n".join(run.stdout.splitlines()[-40:])
