"""Between torch's batch norm modules and ours, in place."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.fx import GraphModule
from torch.nn.utils import parametrize

from bn_ext import modules

Model = TypeVar("Model", bound=torch.nn.Module)


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    cls_to_become = modules.BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    cls_to_become = modules.BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    cls_to_become = modules.BatchNorm3d  # type: ignore[assignment]


_OURS: dict[type, type] = {
    torch.nn.BatchNorm1d: modules.BatchNorm1d,
    torch.nn.BatchNorm2d: modules.BatchNorm2d,
    torch.nn.BatchNorm3d: modules.BatchNorm3d,
    torch.nn.LazyBatchNorm1d: LazyBatchNorm1d,
    torch.nn.LazyBatchNorm2d: LazyBatchNorm2d,
    torch.nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: Model) -> Model:
    """Makes every :class:`torch.nn.BatchNorm1d`, ``2d`` and ``3d`` in ``model`` (itself included) ours.

    The modules stay the same objects with the same parameters, buffers, parametrizations, hooks and flags; only their
    class changes. Lazy ones become ours with their first input. Subclasses, whose forward may be their own, and
    :class:`torch.nn.SyncBatchNorm`, whose statistics span processes, are left as they are.

    Returns:
        ``model``.
    """
    return _with_classes(model, _OURS)


def revert(model: Model) -> Model:
    """Undoes :func:`convert`: every module of ours in ``model`` that is one of torch's too becomes torch's again, in
    place. Returns ``model``.

    Raises:
        ValueError: a module that a graph calls with a residual or an activation, which torch's would not take.
            Nothing is changed then.
    """
    for module in model.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            called = node.op == "call_module" and _is_ours(module.get_submodule(node.target))
            if called and len(node.args) + len(node.kwargs) > 1:
                raise ValueError(f"revert: {node.target} is called with a residual or an activation: torch's has none")
    return _with_classes(model, _TORCHS)


def _is_ours(module: torch.nn.Module) -> bool:
    return parametrize.type_before_parametrizations(module) in _TORCHS


def _with_classes(model: Model, classes: dict[type, type]) -> Model:
    for module in model.modules():
        cls = type(module)
        if cls in classes:
            module.__class__ = classes[cls]
        elif (base := parametrize.type_before_parametrizations(module)) in classes:
            # Parametrizing made a class for this module, but copies of the module may share it.
            module.__class__ = type(cls.__name__, (classes[base],), dict(vars(cls)))
    return model
