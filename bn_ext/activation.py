"""The activations that can follow a batch norm, by torch's names and in torch's operators.

:data:`NAMES` are the names, :data:`DEFAULTS` the parameter of each, None where it has none, and :data:`PARAMETERS` the
names that torch gives the parameters.

Example:
    >>> bn_ext.activation.NAMES[:4]
    ('identity', 'relu', 'relu6', 'leaky_relu')
    >>> bn_ext.activation.DEFAULTS["leaky_relu"], bn_ext.activation.DEFAULTS["relu"]
    (0.01, None)
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor

from bn_ext._load import _C

# The table is BN_ACTIVATIONS in csrc/core/activation.h. The operators below batch_norm take the place in NAMES.
NAMES = tuple(name for name, _, _ in _C.activations())
DEFAULTS = {name: default for name, _, default in _C.activations()}
PARAMETERS = {name: parameter for name, parameter, _ in _C.activations() if parameter is not None}

# Functions of torch with an option that makes them another activation: function, option, value.
VARIANTS = {"gelu_tanh": ("gelu", "approximate", "tanh")}

# The names for editors and type checkers. TorchScript, which compiles the modules' forward, knows no Literal.
Names = Literal[
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
    "mish",
    "celu",
    "gelu_tanh",
]
if TYPE_CHECKING:
    Name = Names
else:
    Name = str


def check(activation: str | None, param: float | None) -> None:
    """Does nothing but raise.

    Args:
        activation: a name, or None for none.
        param: its parameter, or None for the default.

    Raises:
        ValueError: the name is none of :data:`NAMES`, or has no parameter; the parameter of celu is 0.

    Example:
        >>> bn_ext.activation.check("elu", 1.0)
        >>> bn_ext.activation.check("relu", 1.0)
        Traceback (most recent call last):
        ValueError: activation_param is for leaky_relu, elu, celu, got 1.0 with activation='relu'
    """
    if activation is not None and activation not in NAMES:
        near = get_close_matches(str(activation).lower(), NAMES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"activation should be None or one of {', '.join(NAMES)}, got {activation!r}{hint}")
    if param is not None and DEFAULTS[activation or "identity"] is None:
        takers = ", ".join(PARAMETERS)
        raise ValueError(f"activation_param is for {takers}, got {param} with activation={activation!r}")
    if activation == "celu" and param == 0:
        raise ValueError("activation_param of celu should not be 0")


def apply(input: Tensor, activation: str | None, param: float | None) -> Tensor:
    """An activation by torch's own operator.

    Args:
        input: of any shape and floating dtype.
        activation: a name of :data:`NAMES`, or None for none.
        param: its parameter, or None for the default.

    Returns:
        Like ``input``; ``input`` itself without an activation.

    Raises:
        ValueError: as :func:`check`.

    Example:
        >>> bn_ext.activation.apply(torch.tensor([-2.0, 3.0]), "leaky_relu", 0.5)
        tensor([-1.,  3.])
    """
    check(activation, param)
    if activation is None or activation == "identity":
        return input
    if activation in VARIANTS:
        name, option, value = VARIANTS[activation]
        return getattr(F, name)(input, **{option: value})
    function = getattr(F, activation)
    if DEFAULTS[activation] is None:
        return function(input)
    return function(input, DEFAULTS[activation] if param is None else param)
