"""Loads the compiled operators, or says what is in the way."""

from __future__ import annotations

import importlib.util

import torch

_REBUILD = "rebuild it against the torch in use: pip install --no-build-isolation --force-reinstall --no-deps ."


def _check_torch() -> None:
    if importlib.util.find_spec("bn_ext._build_info") is None:
        raise ImportError(f"bn_ext: the operators are not compiled; in its source folder, {_REBUILD}")
    from bn_ext._build_info import torch_version

    if torch_version != torch.__version__:
        found = f"bn_ext was built against torch {torch_version}, this is torch {torch.__version__}"
        raise ImportError(f"{found}; {_REBUILD}")


# An extension for another torch may do worse than fail to load, so this comes before it is touched.
_check_torch()

from bn_ext import _C, _fake  # noqa: E402, F401
