"""Makes batch norm, the addition after it and the activation after that one call, throughout a model."""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph_module import reduce_graph_module
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from bn_ext import activation as activations
from bn_ext import functional, modules
from bn_ext._trace import WRITING_OPERATORS, altered, trace
from bn_ext.graph.convert import convert

_BATCH_NORMS = (modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d)
_BATCH_NORM_FUNCTIONS = (F.batch_norm, functional.batch_norm)
_FUNCTION_ARGUMENTS = tuple(inspect.signature(F.batch_norm).parameters)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}

_ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}
# Functions, in place or not, and methods by their names.
_ACTIVATION_CALLS: dict[Any, str] = {
    spelling: name
    for name in _ACTIVATION_MODULES.values()
    for called in (name, f"{name}_")
    for spelling in (called, getattr(F, called, None), getattr(torch, called, None))
    if spelling is not None
}
# What they take after the input, then perhaps ``inplace``: where the parameter is, and what has no fused form.
_OPTIONS = {"leaky_relu": "negative_slope", "elu": "alpha", "gelu": "approximate"}

# What allocates its output, so that nobody else can write to it.
_ALLOCATING = (nn.modules.conv._ConvNd, nn.Linear)


class Fusion(NamedTuple):
    """What became of one batch norm."""

    batch_norm: str  # its path in the model; the name of its node in the graph, if it is a functional call
    fused: tuple[str, ...]  # what it computes besides, in order: "add", an activation
    reason: str  # why no more; empty after an activation

    def __str__(self) -> str:
        fused = " + ".join(self.fused) or "nothing fused"
        return f"{self.batch_norm}: {fused}" + (f" ({self.reason})" if self.reason else "")


def fuse(model: nn.Module) -> FusedModule:
    """Makes ``activation(batch_norm(input) + residual)``, both of them optional, one call wherever ``model`` does so.

    Every spelling counts: modules, functions, methods, operators, in place or not, either order of the operands. The
    result serves for training and evaluation; the modules in it follow ``train()`` and ``eval()`` one by one, as do the
    flags that functions are given (``F.dropout(x, training=self.training)``).

    What would compute something else is left as it is: batch norms that are called more than once, have hooks, an
    activation or a forward of their own, or whose output (or the sum) others read too. So are the modules
    whose forward cannot be traced (it decides by values, or by ``self.training``) or which have hooks, with all that is
    in them, and modules of your own without a batch norm.

    What :mod:`torch.fx` does not see stays as it was when traced: Python state, random numbers drawn by Python, which
    optional inputs are None. An activation that keeps its residual refuses, in the backward, one that was written to
    since by a module that is called as it is. Prune and parametrize before fusing: the two models share their tensors.

    An addition in place of operands of different types gives the wider type, as the one that is not in place does.

    Args:
        model: any module. It stays as it is, and shares its parameters and buffers with the result, even when one
            of the two is moved, cast or loaded into.

    Returns:
        A :class:`FusedModule`, which is a :class:`torch.fx.GraphModule` with the ``state_dict`` of ``model``. Its
        batch norms are ours (see :func:`bn_ext.convert`), its traced modules have no forward of their own. Its
        ``fusions`` hold one :class:`Fusion` for each batch norm, to look at or ``print(*fused.fusions, sep="\\n")``.

    Raises:
        torch.fx.proxy.TraceError: the forward of ``model`` itself cannot be traced. Modules in it may.
    """
    if "forward" in vars(model):
        raise TraceError(f"bn_ext.fuse: {type(model).__name__} has a forward set on the object, which is not traced")
    # The groups too, so that what is put in place of a tensor stays shared.
    shared = [t for m in model.modules() for group in (m._parameters, m._buffers) for t in (group, *group.values())]
    twin = convert(copy.deepcopy(model, {id(t): t for t in shared}))
    graph, opaque = trace(twin)
    fusions = _Fuser(twin, graph).run()
    seen = {fusion.batch_norm for fusion in fusions}
    fusions += [
        Fusion(path, (), _why_unseen(path, opaque))
        for path, module in twin.named_modules()
        if isinstance(module, _BatchNorm) and path not in seen
    ]
    fused = FusedModule(twin, graph, type(model).__name__)
    fused.fusions = fusions
    return fused


class FusedModule(GraphModule):
    """A graph with all of the model it is of, and not only what the graph names: state, hooks, attributes, in order."""

    fusions: list[Fusion]

    def __init__(self, root: nn.Module, graph: Graph, class_name: str = "FusedModule") -> None:
        super().__init__(root, graph, class_name)
        own = vars(self).keys() - vars(nn.Module()).keys()
        vars(self).update((name, value) for name, value in vars(root).items() if name not in own)

    def __reduce__(self) -> tuple[Any, ...]:
        _, (state, imports) = super().__reduce__()
        return _restored, (state, imports, type(self).__name__)

    def _deepcopy_init(self) -> Callable[..., None]:
        return FusedModule.__init__


def _restored(state: dict[str, Any], imports: str, class_name: str) -> FusedModule:
    root = nn.Module()
    vars(root).update(state)
    module = cast("GraphModule", reduce_graph_module(state, imports))
    return FusedModule(root, module.graph, class_name)


class _ObstacleError(Exception):
    """Why a batch norm is not fused with more."""


class _Fuser:
    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph = graph
        self.modules = dict(model.named_modules())
        called = [self.modules[node.target] for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(part for module in called for part in module.modules())

    def run(self) -> list[Fusion]:
        """The last first: of two batch norms that are added, it is the one that finds the other's output there."""
        return [self.fuse(node) for node in reversed(list(self.graph.nodes)) if self.is_batch_norm(node)][::-1]

    def is_batch_norm(self, node: Node) -> bool:
        return node.target in _BATCH_NORM_FUNCTIONS or isinstance(self.module(node), _BatchNorm)

    def module(self, node: Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def fuse(self, batch_norm: Node) -> Fusion:
        following: list[Node] = []
        fused: list[str] = []
        reason = ""
        try:
            self.check(batch_norm)
            user = _only_user(batch_norm)
            if user.op != "call_module" and user.target in _ADDITIONS:
                residual = self.residual(batch_norm, user)
                user.prepend(batch_norm)  # where the residual is there
                batch_norm.update_kwarg("residual", residual)
                fused, following = ["add"], [user]
                user = _only_user(user)
            fused += [self.give_activation(batch_norm, user)]
            following += [user]
        except _ObstacleError as obstacle:
            reason = str(obstacle)
        if following:
            following[-1].replace_all_uses_with(batch_norm)
        for node in reversed(following):
            self.graph.erase_node(node)
        if following and batch_norm.op == "call_function":
            batch_norm.target = functional.batch_norm
        return Fusion(str(batch_norm.target if batch_norm.op == "call_module" else batch_norm), tuple(fused), reason)

    def check(self, batch_norm: Node) -> None:
        """Whether it is one that can be given more."""
        module = self.module(batch_norm)
        plain = _FUNCTION_ARGUMENTS if module is None else ("input",)
        if len(batch_norm.args) > len(plain) or not batch_norm.kwargs.keys() <= set(plain):
            raise _ObstacleError("has a residual or an activation already")
        if module is None:
            return
        if type(module) not in _BATCH_NORMS:
            raise _ObstacleError(f"is a {type(module).__name__}")
        if altered(module):
            raise _ObstacleError("has hooks or a forward set on the object")
        if self.calls[module] > 1:
            raise _ObstacleError("is called more than once")

    def residual(self, batch_norm: Node, addition: Node) -> Node:
        """What is added to the batch norm's output."""
        operands = _arguments(addition, "input", "other")
        if operands.pop("alpha", 1) != 1 or operands.keys() != {"input", "other"}:
            raise _ObstacleError("the addition has options")
        residual = operands["other" if operands["input"] is batch_norm else "input"]
        if residual is batch_norm or not isinstance(residual, Node):
            raise _ObstacleError("what is added is no other tensor")
        if self.writes(addition, residual):
            raise _ObstacleError(f"it is added to {residual} in place")
        # To some activations' backward it is an input like any other.
        if any(addition < user and self.writes(user, residual) for user in residual.users):
            raise _ObstacleError(f"{residual}, which is added, is written to later")
        input = _arguments(batch_norm, "input")["input"]
        allocated = isinstance(self.module(input), _ALLOCATING) and len(input.users) == 1
        if batch_norm.next is not addition and not allocated:
            raise _ObstacleError(f"{input}, its input, might be written to before what is added is there")
        return residual

    def give_activation(self, batch_norm: Node, node: Node) -> str:
        """Makes the activation that ``node`` is the batch norm's. Returns its name."""
        module = self.module(node)
        name = _ACTIVATION_CALLS.get(node.target) if module is None else _ACTIVATION_MODULES.get(type(module))
        if name is None or (module is not None and altered(module)):
            raise _ObstacleError(f"then {node.target if isinstance(node.target, str) else node.target.__name__}")
        option = _OPTIONS.get(name)
        names = ["input", option, "inplace"] if option else ["input", "inplace"]
        attributes = {} if module is None else vars(module)
        given = {n: attributes[n] for n in names if n in attributes} or _arguments(node, *names)
        param = given.get(option or "")
        has_param = activations.DEFAULTS[name] is not None
        fits = isinstance(param, (int, float)) if has_param else param == "none"
        if not given.keys() <= set(names) or not isinstance(given.get("inplace", False), bool):
            raise _ObstacleError(f"{name} has other options")
        if not (param is None or fits):
            raise _ObstacleError(f"{name} has {option}={param}")
        extras = {"activation": name}
        if has_param and param is not None:
            extras["activation_param"] = param
        batch_norm.kwargs = {**batch_norm.kwargs, **extras}
        return name

    def writes(self, node: Node, tensor: Node) -> bool:
        """Whether ``node`` is seen to write to ``tensor``."""
        if node.args[:1] != (tensor,):
            return False
        if node.op == "call_module":
            return getattr(self.module(node), "inplace", False)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        flagged = any(given is True for given in (*node.args, node.kwargs.get("inplace")))
        return flagged or node.target in WRITING_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _why_unseen(path: str, opaque: Mapping[str, str]) -> str:
    inside = next((outer for outer in opaque if path.startswith(f"{outer}.")), None)
    return "not called" if inside is None else f"inside {inside}, which {opaque[inside]}"


def _only_user(node: Node) -> Node:
    if len(node.users) != 1:
        raise _ObstacleError(f"{node} is used {len(node.users)} times")
    return next(iter(node.users))


def _arguments(node: Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name, of which ``names`` are those that may be positional."""
    return {**dict(zip(names, node.args)), **node.kwargs}
