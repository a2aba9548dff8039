"""Fixtures and settings common to all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Threads that spin at a barrier starve each other where cores are shared (pytest -n): before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import problems
import pytest
import torch

# The same examples in every run, so that a failure is everyone's failure.
hypothesis.settings.register_profile("bn_ext", deadline=None, derandomize=True, print_blob=False)
hypothesis.settings.load_profile("bn_ext")


def pytest_report_header() -> str:
    isa = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, CPU capability {isa}, devices {', '.join(problems.DEVICES)}"


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
