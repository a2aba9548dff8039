"""Keeps Dynamo from capturing functions, without loading it."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

_STRATEGY = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT)  # of the function, and of what it calls


def never_captured(*functions: Callable[..., Any]) -> None:
    """Has Dynamo run ``functions`` as they are. It still captures what they call."""
    for function in functions:
        set_code_exec_strategy(function.__code__, _STRATEGY)


def never_captured_in(names: dict[str, object]) -> None:
    """Has Dynamo run every function and method that a module defines as it is. ``names`` is the module's namespace."""
    found = [*names.values()]
    found += [method for one in found if isinstance(one, type) for method in vars(one).values()]
    own = [one for one in found if isinstance(one, FunctionType) and one.__module__ == names["__name__"]]
    never_captured(*own)
