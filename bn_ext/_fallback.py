"""Warnings for calls that torch's own operators answer, in place of our kernels."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch

from bn_ext._load import _C

_warns = False


def set_warn_fallback(enabled: bool) -> None:
    """Whether a call that falls back to torch's own operators warns and gives the reason.

    The environment variable ``BN_EXT_WARN_FALLBACK=1``, read when bn_ext is imported, has the same effect.
    docs/fallbacks.md lists the reasons. Results are the same with and without the warning.

    Args:
        enabled: True to warn, False for silence, as at first.

    Example:
        >>> bn_ext.set_warn_fallback(True)  # doctest: +SKIP
        >>> y = bn_ext.BatchNorm2d(8)(torch.randn(2, 8, 4, 4), residual=torch.zeros(8, 1, 1))  # doctest: +SKIP
        UserWarning: bn_ext: batch norm of torch.float32 (2, 8, 4, 4) on cpu is normalized by our kernels, and finished
        by torch's own operators: the residual differs from the input in sizes, dtype, device or layout
    """
    global _warns  # noqa: PLW0603
    _warns = bool(enabled)
    _C.warn_of_fallbacks(_warns)


def fell_back(input: Any, reason: str, how: str = "runs on torch's own operators") -> None:
    """Warns, if warnings are enabled. The operators in C++ call it too."""
    if not _warns or torch.compiler.is_dynamo_compiling():  # a warning would break the graph
        return
    frame, level = sys._getframe(), 1
    internal = ("bn_ext", "torch", "")  # code that torch generates has no name
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in internal:
        frame, level = frame.f_back, level + 1
    what = f"batch norm of {input.dtype} {tuple(input.shape)} on {input.device}"
    warnings.warn(f"bn_ext: {what} {how}: {reason}", stacklevel=level)


set_warn_fallback(os.environ.get("BN_EXT_WARN_FALLBACK") == "1")
