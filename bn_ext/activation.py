"""The activations that can follow a batch norm, by torch's names and in torch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

NAMES = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "silu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "sigmoid",
    "tanh",
)

# Those with a parameter, negative_slope and alpha, and what it is unless given.
PARAMS = {"leaky_relu": 0.01, "elu": 1.0}


def check(activation: str | None, param: float | None) -> None:
    """Raises ValueError for a name that is none of :data:`NAMES`, or a parameter for one that has none."""
    if activation is not None and activation not in NAMES:
        raise ValueError(f"activation should be None or one of {', '.join(NAMES)}, got {activation!r}")
    if param is not None and activation not in PARAMS:
        raise ValueError(f"activation_param is for {' and '.join(PARAMS)}, got {param} with activation={activation!r}")


def apply(input: Tensor, activation: str | None, param: float | None) -> Tensor:
    """The activation of ``input``, of any shape, by torch's own operator."""
    if activation is None or activation == "identity":
        return input
    function = getattr(F, activation)
    if activation not in PARAMS:
        return function(input)
    return function(input, PARAMS[activation] if param is None else param)
