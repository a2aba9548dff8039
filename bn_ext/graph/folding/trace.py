"""Traces a model by torch.fx to see which layers and batch norms it calls; of what cannot be traced, the parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from bn_ext.graph.folding.watch import Watch

_SEEN_THROUGH = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Linear, _ConvNd, _DropoutNd)
_SIMPLE = (type(None), bool, int, float, str)  # what torch.fx compares with what is given later
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
        if type(part).forward is nn.Module.forward:  # a container, which is not called
            parts += part.children()
            continue
        tracer = _Tracer(watch)
        marks = watch.marks()
        try:
            if "forward" in vars(part):
                raise TypeError("it has a forward of its own")
            with torch.no_grad(), watch.watching():
                graph = tracer.trace(part, _defaults(part))
        except Exception as error:
            watch.forget(marks)
            watch.fail(part, error)
            parts += part.children()
        else:
            watch.read_nodes(graph, part)
            parts += tracer.parts
    watch.find_kept()


class _Value(Proxy):
    """Does not pass for something else than the tensor that it may stand for."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance asks for it, after the type
        code = inspect.currentframe().f_back.f_code  # type: ignore[union-attr]
        if not code.co_filename.startswith(_TORCH) or code.co_name in _TYPE_CHECKS:
            raise TypeError("it depends on the type of a value, which only a run tells")
        return _Value


class _Tracer(fx.Tracer):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.parts: list[nn.Module] = []  # called as they are

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val  # a parameter stays the object that it is

    def proxy(self, node: fx.Node) -> Proxy:
        return _Value(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if m in self.watch.altered or (_is_opaque(m) and m not in self.watch.norms):
            return self._call_whole(m, args, kwargs)
        marks, last = self.watch.marks(), self._last()
        try:
            return forward(*args, **kwargs)
        except Exception as error:
            self.watch.forget(marks)
            self.watch.fail(m, error)
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
    """Whether ``module`` is one of torch's own in which there is no pair to find."""
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, _SEEN_THROUGH)


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _SIMPLE)}
