"""Traces a model by torch.fx to see which layers and batch norms it calls; or its parts, if it cannot be traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Proxy
from torch.fx.proxy import Attribute
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from bn_ext.graph.folding.watch import Watch

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_SEEN_THROUGH = (*_WRAPPERS, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Linear, _ConvNd, _DropoutNd)
_COMPARED = (type(None), bool, int, float, str)  # what torch.fx compares with what is given later
_TYPE_CHECKS = ("is_tensor", "_isinstance", "container_checker")  # torch's own
_TORCH = str(Path(torch.__file__).parent)


def trace(watch: Watch) -> None:
    """Shows ``watch`` its model in traces: of the model or, where that cannot be traced, of its parts."""
    parts = [watch.model]
    seen: set[nn.Module] = set(watch.norms)
    while parts:
        part = parts.pop()
        if part in seen or _is_opaque(part):
            continue
        seen.add(part)
        if type(part).forward is nn.Module.forward or isinstance(part, _WRAPPERS):
            parts += part.children()
            continue
        tracer = _Tracer(watch)
        result = watch.attempt(part, partial(tracer.trace, part))
        if result is None:
            parts += part.children()
        else:
            watch.read_nodes(result[0], part)
            parts += tracer.parts
    watch.find_kept()


class _Value(Proxy):
    """A traced value. It stands for a tensor, and ends the trace of code that asks for its type or value."""

    tracer: _Tracer

    def _ask(self, *_: Any) -> Any:
        self.tracer.watch.asked = TypeError("it asks for the type or value of a tensor, which only a run tells")
        raise self.tracer.watch.asked  # which the model may catch

    __bool__ = __int__ = __float__ = __complex__ = __index__ = __len__ = _ask

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it, after the type
        code = inspect.currentframe().f_back.f_code  # type: ignore[union-attr]
        if not code.co_filename.startswith(_TORCH) or code.co_name in _TYPE_CHECKS:
            self._ask()
        return _Value

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


class _Attribute(Attribute, _Value):
    pass


class _Tracer(fx.Tracer):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.parts: list[nn.Module] = []  # called as they are

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        if "forward" in vars(root):
            raise TypeError("it has a forward of its own")
        with torch.no_grad(), self.watch.watching():
            return super().trace(root, _optional(root))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # a parameter stays the object that it is

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def iter(self, obj: Any) -> Any:
        return obj._ask()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        opaque = _is_opaque(m) and m not in self.watch.norms
        if opaque or m in self.watch.altered or isinstance(m, _WRAPPERS):
            return self._call_whole(m, args, kwargs)
        last = self._last()
        result = self.watch.attempt(m, lambda: forward(*args, **kwargs))
        if result is not None:
            return result[0]
        while (node := self._last()) is not last:
            self.graph.erase_node(node)
        return self._call_whole(m, args, kwargs)

    def _last(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def _call_whole(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inspect.signature(m.forward).bind(*args, **kwargs)  # raises what a call would raise
        if _is_opaque(m):
            self.watch.elsewhere |= {id(parameter) for parameter in m.parameters()}
        elif m in self.watch.paths:  # not one that was made on the way
            self.parts.append(m)
        return self.create_proxy("call_module", type(m).__name__, args, kwargs)


def _is_opaque(module: nn.Module) -> bool:
    """Whether ``module`` is a script, or one of torch's own in which there is no pair to find."""
    torchs = type(module).__module__.startswith("torch.nn") and not isinstance(module, _SEEN_THROUGH)
    return torchs or isinstance(module, torch.jit.ScriptModule)


def _optional(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _COMPARED)}
