"""Importing the package succeeds or says what is wrong, each time in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import forked
import pytest
import torch

import bn_ext
from bn_ext import _build_info

PACKAGE = Path(bn_ext.__file__).parent


def error_of(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: bn_ext")
    assert "pip install --no-build-isolation" in message
    return message


def copied_without(folder: Path, *patterns: str) -> Path:
    """A copy of the package without its files of these names, in ``folder``."""
    shutil.copytree(PACKAGE, folder / "bn_ext", ignore=shutil.ignore_patterns("__pycache__", *patterns))
    return folder


def test_built_against_this_torch() -> None:
    assert _build_info.torch_version == torch.__version__


@pytest.mark.parametrize("module", ["", ".activation", ".functional"])
def test_another_torch_is_refused_before_the_operators_are_loaded(tmp_path: Path, module: str) -> None:
    """Loaded, operators for another torch lack symbols, or worse: these end the process."""
    copy = copied_without(tmp_path, "_C*", "_build_info.py")
    (copy / "bn_ext" / "_C.py").write_text("import os; os._exit(3)")
    (copy / "bn_ext" / "_build_info.py").write_text('torch_version = "99.0.0+cpu"')
    message = error_of(forked.run(f"import bn_ext{module}", folder=copy))
    assert "99.0.0+cpu" in message and torch.__version__ in message


def test_operators_that_do_not_load_are_refused_with_advice(tmp_path: Path) -> None:
    copy = copied_without(tmp_path, "_C*")
    (copy / "bn_ext" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library" * 99)
    message = error_of(forked.run("import bn_ext", folder=copy))
    assert "do not load" in message and torch.__version__ in message and "invalid ELF header" in message


def test_operators_for_another_python_are_refused_with_advice(tmp_path: Path) -> None:
    copy = copied_without(tmp_path, "_C*")
    (copy / "bn_ext" / "_C.cpython-399-other.so").touch()
    assert "do not load in Python 3." in error_of(forked.run("import bn_ext", folder=copy))


def test_a_source_folder_that_is_not_compiled_is_named(tmp_path: Path) -> None:
    copy = copied_without(tmp_path, "_C*", "_build_info.py")
    message = error_of(forked.run("import bn_ext", folder=copy))
    assert f"{copy / 'bn_ext'} is not compiled" in message
    assert f"hides {PACKAGE}, so run Python from another folder" in message


def test_import_is_light_and_silent() -> None:
    """No compiler stack, no start of CUDA, no output, no change of torch's settings."""
    code = (
        "import sys, torch; before = set(sys.modules), torch.get_num_threads(), torch.get_default_dtype()\n"
        "import bn_ext; loaded = set(sys.modules) - before[0]\n"
        "assert (torch.get_num_threads(), torch.get_default_dtype()) == before[1:]\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not [m for m in loaded if m.startswith(('torch._dynamo', 'torch._inductor'))], loaded\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == run.stderr == ""


def test_public_names() -> None:
    assert set(bn_ext.__all__) >= {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "convert", "functional", "revert"}
    assert all(hasattr(bn_ext, name) for name in bn_ext.__all__)
