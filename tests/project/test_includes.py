"""Includes go one way: a layer knows the layers below it, and kernels know nothing of tensors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# The folders whose headers each folder may include, its own aside.
BELOW = {
    "core": set(),
    "cpu/vec": {"core"},
    "cpu/kernels": {"core", "cpu", "cpu/vec"},
    "cpu": {"core", "cpu/kernels"},
    "cuda/gpu": set(),
    "cuda": {"core", "cuda/gpu"},
    "cuda/kernel": {"core", "cuda", "cuda/gpu"},
    "cuda/passes": {"core", "cuda", "cuda/gpu", "cuda/kernel"},
    "ops": {"core", "cpu", "cuda"},
    "python": {"core", "cpu", "cuda", "ops"},
}

# What of torch each layer may include.
TORCH = {
    "core": r"c10/util/(BFloat16|Half)\.h",
    "cpu": r"ATen/(Parallel|Version)\.h|ATen/cpu/vec/.*",
    "cuda": "",
    "ops": ".*",
    "python": r"torch/csrc/(Exceptions|utils/pybind)\.h",
}
FILES = sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu"))


def includes(path: Path, quoted: bool) -> list[str]:
    mark = '"' if quoted else "<"
    return re.findall(rf'^ *#include {mark}([^">]+)', path.read_text(), re.MULTILINE)


def test_every_folder_is_known() -> None:
    assert {str(p.parent.relative_to(CSRC)) for p in FILES} == BELOW.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_includes_go_down(path: Path) -> None:
    folder = str(path.parent.relative_to(CSRC))
    for name in includes(path, quoted=True):
        assert (CSRC / name).is_file(), f"{name} is not in csrc"
        assert str(Path(name).parent) in BELOW[folder] | {folder}, f"{folder} does not know {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CSRC)))
def test_only_operators_see_tensors(path: Path) -> None:
    layer = path.relative_to(CSRC).parts[0]
    of_torch = [name for name in includes(path, quoted=False) if name.startswith(("ATen/", "c10/", "torch/"))]
    assert not [name for name in of_torch if not re.fullmatch(TORCH[layer], name)]
