"""From a model to a graph of calls in which every batch norm is one call, for training and evaluation alike."""

from __future__ import annotations

import operator
import traceback
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from bn_ext import functional

WRITING_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FLAG = "_training"


class _Flag:
    """Stands for the training flag of a module while it is traced, so that the graph reads it when it runs."""

    def __init__(self, path: str, value: bool) -> None:
        self.node_target = f"{path}.{_FLAG}".lstrip(".")
        self.value = value

    def __bool__(self) -> bool:
        raise TraceError("control flow depends on the training flag")

    def __eq__(self, other: object) -> bool:
        return bool(self)

    __hash__ = None  # type: ignore[assignment]


class TrainingFlag(nn.Module):
    """Gives the training flag of the module it is in: unlike an attribute, a call stays one when traced again."""

    def forward(self) -> bool:
        return self.training


class _Proxy(Proxy):
    """Is written to in place where a tensor is: to fx's own, ``+=`` is ``+``."""


def _in_place(function: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in WRITING_OPERATORS:
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


def _context() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


class Tracer(torch.fx.Tracer):
    """Keeps what fx's own loses: that ``+=`` is in place, and that a context has changed, which is an error."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        if isinstance(root, _BatchNorm):
            raise TraceError("it is a batch norm itself, with nothing around it")
        self.context = _context()
        return super().trace(root, concrete_args)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Proxy:
        if _context() != self.context:
            raise TraceError("it changes gradient mode or autocast on its way")
        return super().create_proxy(*args, **kwargs)

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)


class _Tracer(Tracer):
    def __init__(self, opaque: Container[str] = ()) -> None:
        super().__init__(autowrap_functions=(functional.batch_norm,))
        self._autowrap_search.append(functional)
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A module of one's own that holds no batch norm is called as it is, whatever it does."""
        return (
            module_qualified_name in self.opaque
            or isinstance(m, _BatchNorm)
            or super().is_leaf_module(m, module_qualified_name)
            or (type(m) is not nn.Sequential and not any(hasattr(part, "running_mean") for part in m.modules()))
        )

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, _Flag):
            return self.create_node("call_module", a.node_target, (), {})
        return super().create_arg(a)


def trace(model: nn.Module) -> tuple[Graph, dict[str, str]]:
    """The graph of ``model``, and the modules that could not be traced, with the reasons."""
    opaque = {path: "has hooks" for path, module in model.named_modules() if path and _hooked(module)}
    flags = {module: _Flag(path, module.training) for path, module in model.named_modules()}
    for module, flag in flags.items():
        module.training = flag  # type: ignore[assignment]
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model)
            break
        except Exception as error:
            running = [path for path, _ in tracer.module_stack.values()]
            traced = [path for path in running if not tracer.is_leaf_module(model.get_submodule(path), path)]
            reason = f"cannot be traced: {_place(error)}{error}"
            if not traced:
                raise TraceError(f"bn_ext.fuse: {type(model).__name__} {reason}") from error
            opaque[traced[-1]] = reason
    for module, flag in flags.items():
        module.training = flag.value
    for path in tracer.num_calls:
        module = model.get_submodule(path)
        if not tracer.is_leaf_module(module, path):
            module.__class__ = nn.Module  # its forward would do what the batch norms in it now do
    for node in graph.nodes:
        if isinstance(node.type, str):  # where annotations are not evaluated; it would not pickle
            node.type = None
        if node.op == "call_module" and node.target.rpartition(".")[2] == _FLAG:
            owner = model.get_submodule(node.target.rpartition(".")[0])
            owner.add_module(_FLAG, TrainingFlag().train(owner.training))
    return graph, opaque


def _place(error: Exception) -> str:
    """The line of the model where ``error`` arose."""
    not_the_models = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_the_models)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)


def altered(module: nn.Module) -> bool:
    """Whether a call of ``module`` does other things than the forward of its class."""
    return _hooked(module) or "forward" in vars(module)
