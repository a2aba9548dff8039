"""How code spells additions and activations: as functions, methods or operators, in place or not, or written out."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from bn_ext import activation as activations
from bn_ext.graph.fusion.effects import name_of

_PLACES = (torch, F, operator, Tensor, torch._C._nn)
_SYNONYMS = {"multiply": "mul", "truediv": "div", "divide": "div", "true_divide": "div"}
_IN_PLACE_OPERATORS = {"iadd": "add", "imul": "mul", "itruediv": "div"}
_BINARY = ("add", "mul", "div")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
# The arguments after the operands, in order, and what they are unless given.
_OPTIONS: dict[str, dict[str, Any]] = {
    "add": {"alpha": 1},
    "mul": {},
    "div": {"rounding_mode": None},
    "clamp": {"min": None, "max": None},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0, "inplace": False},
    "relu": {"inplace": False},
    "relu6": {"inplace": False},
    "leaky_relu": {"negative_slope": 0.01, "inplace": False},
    "elu": {"alpha": 1.0, "inplace": False},
    "elu_": {"alpha": 1.0, "scale": 1.0, "input_scale": 1.0},
    "silu": {"inplace": False},
    "gelu": {"approximate": "none"},
    "hardswish": {"inplace": False},
    "hardsigmoid": {"inplace": False},
    "sigmoid": {},
    "tanh": {},
    "mish": {"inplace": False},
    "celu": {"alpha": 1.0, "inplace": False},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    **{name: {"p": 0.5, "training": True, "inplace": False} for name in _DROPOUTS},
}
_USUAL = {"scale": 1.0, "input_scale": 1.0, "approximate": "none"}
# The activation that an expression computes. A clamp passes gradients on at its limits, where relu6 does not: it may
# stand for relu6 in hardswish alone, whose gradient there is torch's then.
_EXPRESSIONS = {
    "relu6(x)": "relu6",
    "mul(sigmoid(x), x)": "silu",
    "mul(tanh(softplus(x, 1.0, 20.0)), x)": "mish",
    "mul(hardsigmoid(x), x)": "hardswish",
    "div(relu6(add(3.0, x)), 6.0)": "hardsigmoid",
    "mul(div(relu6(add(3.0, x)), 6.0), x)": "hardswish",
    "div(mul(relu6(add(3.0, x)), x), 6.0)": "hardswish",
    "mul(div(clamp(add(3.0, x), 0.0, 6.0), 6.0), x)": "hardswish",
    "div(mul(clamp(add(3.0, x), 0.0, 6.0), x), 6.0)": "hardswish",
}
_LONGEST = 4  # calls


class Call(NamedTuple):
    """A call of a function that is known here, with no arguments that are not."""

    name: str
    operands: tuple[Any, ...]
    options: Mapping[str, Any]
    in_place: bool


class Activation(NamedTuple):
    """An activation of one node's result."""

    name: str
    param: float | None
    calls: tuple[Node, ...]  # that compute it, in order


def call_of(node: Node) -> Call | None:
    """Finds what a node calls, if that is known here."""
    called = name_of(node)
    is_known = node.op == "call_method" or any(getattr(place, called, None) is node.target for place in _PLACES)
    if node.op not in ("call_function", "call_method") or not is_known:
        return None
    name = _IN_PLACE_OPERATORS.get(called) or called.removesuffix("_")
    name = _SYNONYMS.get(name, name)
    options = _OPTIONS.get(called, _OPTIONS.get(name))
    if options is None:
        return None
    operands = ("input", "other") if name in _BINARY else ("input",)
    names = (*operands, *options)
    given = {**options, **dict(zip(names, node.args)), **node.kwargs}
    if len(node.args) > len(names) or given.keys() != set(names):
        return None
    flagged = given.pop("inplace", False) is not False
    in_place = flagged or called.endswith("_") or called in _IN_PLACE_OPERATORS
    return Call(name, tuple(given.pop(operand) for operand in operands), given, in_place)


def passes_through(node: Node) -> Node | None:
    """A dropout that drops nothing returns its input."""
    call = call_of(node)
    if call is None or call.name not in _DROPOUTS or not (call.options["p"] == 0 or call.options["training"] is False):
        return None
    return call.operands[0]


def reader(node: Node) -> Node | None:
    """The only node that reads a result, or the first one if it overwrites the result before the others read it."""
    first = min(node.users, default=None)
    if first is None or len(node.users) == 1:
        return first
    call = call_of(first)
    return first if call is not None and call.in_place and call.operands[0] is node else None


def activation_of(node: Node) -> Activation | None:
    """The activation of a result, if nothing else reads the result."""
    following = reader(node)
    call = None if following is None else call_of(following)
    if following is not None and call is not None and call.operands == (node,) and call.name in activations.NAMES:
        options = dict(call.options)
        for variant, (name, option, value) in activations.VARIANTS.items():
            if call.name == name and call.options[option] == value:
                return Activation(variant, None, (following,))
        param = options.pop(activations.PARAMETERS.get(call.name, ""), None)
        if options.items() <= _USUAL.items() and isinstance(param, (int, float, type(None))):
            return Activation(call.name, None if param is None else float(param), (following,))
        return None
    return _written_out(node)


def _written_out(start: Node) -> Activation | None:
    """An activation in several calls, or by another name."""
    expressions = {start: "x"}
    readers = set(start.users)
    while readers and len(expressions) <= _LONGEST:
        node = min(readers)
        readers.remove(node)
        expression = _expression(node, expressions)
        if expression is None:  # something else reads one of the results
            return None
        if not readers and (name := _EXPRESSIONS.get(expression)) is not None:
            return Activation(name, None, (*list(expressions)[1:], node))
        expressions[node] = expression
        readers.update(node.users)
    return None


def _expression(node: Node, expressions: Mapping[Node, str]) -> str | None:
    """Writes out what a call computes of known results and numbers."""
    call = call_of(node)
    if call is None or (call.in_place and any(node < user for user in getattr(call.operands[0], "users", ()))):
        return None  # unknown, or later readers of the operand find something else there
    operands = [expressions.get(o) if isinstance(o, Node) else _number(o) for o in call.operands]
    options = [_number(option) for option in call.options.values()]
    if None in operands or None in options:
        return None
    name = "relu6" if call.name == "hardtanh" and options == ["0.0", "6.0"] else call.name
    if name in ("add", "mul"):
        operands.sort(key=str)
    is_usual = name == "relu6" or options in ([], ["1.0"] if name == "add" else [""])
    return f"{name}({', '.join(map(str, operands if is_usual else [*operands, *options]))})"


def _number(given: Any) -> str | None:
    """As it is written in an expression; the empty string for None."""
    if given is None:
        return ""
    return repr(float(given)) if isinstance(given, (int, float)) else None
