"""Units compiled once per instruction set share no symbols: a CPU could be given instructions that it lacks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted(Path(__file__).parents[2].glob("build/temp*/*/csrc/cpu/kernels/kernels.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
@pytest.mark.skipif(not OBJECTS, reason="the object files of the build are not here")
def test_each_unit_shares_nothing_but_its_table_of_kernels() -> None:
    for built in OBJECTS:
        capability = built.parents[3].name
        table = f"bn::cpu::kernels_{capability.lower()}(bn::Layout, bn::DType, bn::Activation const&, bool)"
        listing = subprocess.run(["nm", "-C", str(built)], check=True, capture_output=True, text=True).stdout
        symbols = [line[17:].split(" ", 1) for line in listing.splitlines() if line[17] in "TWVuDBR"]
        assert ["T", table] in symbols
        # ATen's vectors live in a namespace of their own for each instruction set.
        strangers = [name for _, name in symbols if name != table and f"at::vec::{capability}::" not in name]
        assert not strangers, f"{capability}: {strangers}"
