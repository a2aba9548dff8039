"""The functions that compute a batch norm, and the arguments of a call of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from bn_ext.functional import operator

_OURS = tuple(argument.name for argument in operator.default._schema.arguments)
_TORCHS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_FUNCTIONS = {  # with the names of their arguments
    operator: _OURS,
    operator.default: _OURS,
    torch.batch_norm: _TORCHS,
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}


def arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """The arguments of a call of ``func``, by name; None if ``func`` computes no batch norm."""
    names = _FUNCTIONS.get(func)
    return None if names is None else {**dict(zip(names, args)), **kwargs}
