"""Fixtures and settings common to all tests."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Threads that spin at a barrier starve each other where cores are shared (pytest -n): before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cases
import pytest
import torch

# Inductor's cache outlives the operators that its code calls, so each build of them has its own.
_PACKAGE = Path(__file__).parent.parent / "bn_ext"
_BUILT = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(_PACKAGE.glob("_C*.so")))).hexdigest()[:16]
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), f"bn_ext-inductor-{_BUILT}")))

# On a GPU convolutions would otherwise round to TF32 and add in any order.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cudnn.deterministic = True


def pytest_report_header() -> str:
    isa = torch.backends.cpu.get_cpu_capability()
    gpu = f"no cases on a GPU: {cases.NO_GPU}" if cases.NO_GPU else torch.cuda.get_device_name()
    return f"torch {torch.__version__}, CPU capability {isa}, {gpu}"


@pytest.fixture(params=cases.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def _old_objects() -> None:
    """Has the collector pass by what is there: torch's compiler alone leaves 350,000 objects, which take it 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from the same random state and gives the number of threads back."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
