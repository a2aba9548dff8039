"""Loads the compiled operators, or says why it cannot and what to do."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _compiled_elsewhere() -> Path | None:
    """A compiled bn_ext elsewhere on the path, which this one hides."""
    folders = [Path(entry, "bn_ext").resolve() for entry in sys.path]
    return next((f for f in folders if f != _HERE.resolve() and (f / "_build_info.py").exists()), None)


def _load() -> ModuleType:
    # An extension for another torch may do worse than fail to load, so the version is compared first.
    if importlib.util.find_spec("bn_ext._build_info") is None:
        elsewhere = _compiled_elsewhere()
        hidden = "" if elsewhere is None else f"; it hides {elsewhere}, so run Python from another folder"
        raise ImportError(f"bn_ext: {_HERE} is not compiled{hidden}. To compile it, in its source folder: {_REBUILD}")
    from bn_ext._build_info import torch_version

    if torch_version != torch.__version__:
        found = f"bn_ext was built against torch {torch_version}, this is torch {torch.__version__}"
        raise ImportError(f"{found}. Rebuild it in its source folder: {_REBUILD}")
    try:
        return importlib.import_module("bn_ext._C")
    except ImportError as error:
        python = ".".join(map(str, sys.version_info[:2]))
        what = f"bn_ext: its compiled operators do not load in Python {python} with torch {torch.__version__}"
        raise ImportError(f"{what} ({error}). Rebuild them in the source folder: {_REBUILD}") from error


_C = _load()

from bn_ext import _fake  # noqa: E402, F401
