"""What importing the package does, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import bn_ext
from bn_ext import _build_info


def python(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_built_against_this_torch() -> None:
    assert _build_info.torch_version == torch.__version__


@pytest.mark.parametrize("other", ["99.0.0+cpu"])
def test_another_torch_is_refused_with_advice(other: str) -> None:
    run = python(f"import torch; torch.__version__ = {other!r}; import bn_ext")
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError")
    assert other in message and torch.__version__ in message
    assert "pip install --no-build-isolation" in message


def test_import_is_light_and_silent() -> None:
    """No compiler stack, no start of CUDA, no output, no change of torch's settings."""
    run = python(
        "import sys, torch; before = set(sys.modules), torch.get_num_threads(), torch.get_default_dtype()\n"
        "import bn_ext; loaded = set(sys.modules) - before[0]\n"
        "assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [m for m in loaded if m.startswith(('torch._dynamo', 'torch._inductor'))], loaded\n"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


def test_public_names() -> None:
    assert set(bn_ext.__all__) >= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "functional", "revert"}
    assert all(hasattr(bn_ext, name) for name in bn_ext.__all__)
