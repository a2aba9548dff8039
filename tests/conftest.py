"""Fixtures and settings common to all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that spin at a barrier starve each other where cores are shared (pytest -n): before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import problems
import pytest
import torch

# On a GPU convolutions would otherwise round to TF32 and add in any order.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True


def pytest_report_header() -> str:
    isa = torch.backends.cpu.get_cpu_capability()
    gpu = f"no cases on a GPU: {problems.NO_GPU}" if problems.NO_GPU else torch.cuda.get_device_name()
    return f"torch {torch.__version__}, CPU capability {isa}, {gpu}"


@pytest.fixture(params=problems.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from the same random state and gives the number of threads back."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
