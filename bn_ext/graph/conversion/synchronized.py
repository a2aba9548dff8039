"""Batch norms become synchronized over processes, and what they were again, in place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion import classes, forwards
from bn_ext.graph.conversion.classes import Counterpart, UnlikeError, become, full_name
from bn_ext.graph.conversion.trial import Trials
from bn_ext.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from bn_ext.nn.ranks import check_group
from bn_ext.nn.sync import SyncBatchNorm, SyncBatchNormAct, Weighting, check_weighting

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNormActOfTimm(forwards.BatchNormAct2d, SyncBatchNorm):  # type: ignore[misc]  # of one argument
    """A synchronized batch norm with the modules ``drop`` and ``act`` of timm's classes."""


_PLAIN = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_ACTIVATED = (BatchNormAct1d, BatchNormAct2d, BatchNormAct3d)
_SYNCHRONIZED: dict[str, type[SyncBatchNorm]] = {  # of other libraries, by full names, so that none is imported
    "torch.nn.modules.batchnorm.SyncBatchNorm": SyncBatchNorm,
    "timm.layers.norm_act.SyncBatchNormAct": SyncBatchNormActOfTimm,
}
_OWN = ("process_group", "weighting", "path", "key", "came_from")  # the attributes of a module that was converted


def convert(model: Model, process_group: Any, weighting: Weighting) -> Model:
    """Is :meth:`SyncBatchNorm.convert_sync_batchnorm`."""
    check_model("SyncBatchNorm.convert_sync_batchnorm", model)
    check_group(process_group)
    check_weighting(weighting)
    trials = Trials()
    chosen: list[tuple[str, nn.Module, type[SyncBatchNorm]]] = []
    left: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if not classes.is_batch_norm(module) or any("Frozen" in cls.__name__ for cls in type(module).__mro__):
            continue
        if any(t is not None and is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"convert_sync_batchnorm: {path or 'the model'} is not initialized: run one batch first")
        try:
            chosen.append((path, module, _synchronized(module, trials)))
        except UnlikeError as unlike:
            left[type(module).__name__, str(unlike)].append(path)
    for path, module, cls in chosen:
        if not isinstance(module, SyncBatchNorm):
            before = type_before_parametrizations(module)
            is_counterpart = issubclass(before, Counterpart)
            become(module, cls)
            vars(module)["came_from"] = (classes.original(before) if is_counterpart else before, is_counterpart)
        module.synchronize(process_group, weighting, path)  # type: ignore[operator]
    if left:
        kinds = (f"{len(ps)} {name} ({why}), e.g. {ps[0] or 'the model itself'}" for (name, why), ps in left.items())
        warnings.warn(f"bn_ext: left unsynchronized: {'; '.join(kinds)}", stacklevel=3)
    return model


def revert(model: Model) -> Model:
    """Is :meth:`SyncBatchNorm.revert_sync_batchnorm`."""
    check_model("SyncBatchNorm.revert_sync_batchnorm", model)
    for module in model.modules():
        if (cls := unsynchronized(module)) is not None:
            become(module, cls)
            for name in _OWN:
                if name != "process_group" or not issubclass(cls, nn.SyncBatchNorm):
                    vars(module).pop(name, None)
    return model


def unsynchronized(module: nn.Module) -> type[nn.Module] | None:
    """The class that a converted module had; None for others."""
    came_from = vars(module).get("came_from") if isinstance(module, SyncBatchNorm) else None
    if came_from is None:
        return None
    cls, is_counterpart = came_from
    return classes.counterpart(cls) if is_counterpart else cls


def _synchronized(module: nn.Module, trials: Trials) -> type[SyncBatchNorm]:
    """The synchronized class for a module.

    Raises:
        UnlikeError: there is none.
    """
    cls = type_before_parametrizations(module)
    if issubclass(cls, SyncBatchNorm):
        return cls
    if issubclass(cls, nn.SyncBatchNorm):
        if (known := _SYNCHRONIZED.get(full_name(cls))) is None:
            raise UnlikeError("a forward of their own")
        return known
    ours = cls
    if not classes.is_ours(module):
        ours = classes.counterpart(cls)
        trials.check(module, ours)
    if ours in _ACTIVATED:
        return SyncBatchNormAct
    if ours in _PLAIN or (issubclass(ours, Counterpart) and issubclass(ours, _PLAIN)):
        return SyncBatchNorm
    if issubclass(ours, Counterpart) and issubclass(ours, forwards.BatchNormAct2d):
        return SyncBatchNormActOfTimm
    raise UnlikeError("statistics of other sets of values, or a forward of their own")
