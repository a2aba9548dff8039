"""Between the batch norms of torch and its ecosystem and ours, in place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion import classes, synchronized
from bn_ext.graph.conversion.classes import UnlikeError, become
from bn_ext.graph.conversion.trial import Trials
from bn_ext.graph.fusion.installed import unfuse
from bn_ext.nn.base import FusedForward

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, where: Callable[[str, nn.Module], bool] | None = None) -> Model:
    """Makes the batch norms in ``model`` (itself included) ours.

    The classes it takes are :class:`torch.nn.BatchNorm1d`, ``2d`` and ``3d`` (lazy ones become ours with their first
    input), timm's ``BatchNormAct2d`` and ``FrozenBatchNormAct2d`` (their activation becomes part of the call), the
    ``FrozenBatchNorm2d`` of torchvision and of transformers, and subclasses that override nothing that computes.

    Modules stay the same objects with the same parameters, buffers, parametrizations, hooks and flags. Only their class
    changes, to one derived from it. Classes are recognized by their full names, and all but torch's own by a trial too:
    one module of each class and configuration is copied without its hooks, with random tensors, and must give the same
    outputs and statistics on a random input before and after, in training and evaluation. The trial leaves out modules
    that are not on the CPU or a CUDA device or hold tensors of other classes than torch's.

    One warning names the batch norms that are left as they are: classes, counts, reasons and an example of each.

    Args:
        model: any module.
        where: called with the path and the module of each batch norm that is not ours, and returns whether to convert
            it. A module with several paths is asked about once, by the first.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or ``where`` no function.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> model = bn_ext.convert(model, where=lambda path, module: module.num_features > 4)
        >>> [isinstance(module, bn_ext.BatchNorm2d) for module in model]
        [False, False, True]
    """
    check_model("convert", model)
    if where is not None and not callable(where):
        raise TypeError(f"bn_ext.convert: where should be a function, got an object of {type(where).__name__}")
    if left := make_ours(model, where):
        warnings.warn(f"bn_ext.convert: {left}", stacklevel=2)
    return model


def make_ours(model: nn.Module, where: Callable[[str, nn.Module], bool] | None = None) -> str:
    """Converts ``model``. Returns in words which batch norms are left."""
    found = [(path, module) for path, module in model.named_modules() if classes.is_batch_norm(module)]
    theirs = [(path, module) for path, module in found if not classes.is_ours(module)]
    chosen = [one for one in theirs if where is None or where(*one)]  # before anything is changed
    trials = Trials()
    left: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, module in chosen:
        try:
            ours = classes.counterpart(type_before_parametrizations(module))
            trials.check(module, ours)
        except UnlikeError as unlike:
            left[type(module).__name__, str(unlike)].append(path)
        else:
            become(module, ours)
    if not left:
        return ""
    kinds = (f"{len(ps)} {name} ({why}), e.g. {ps[0] or 'the model itself'}" for (name, why), ps in left.items())
    total = len(found) - len(theirs) + len(chosen)
    converted = total - sum(map(len, left.values()))
    return f"{converted} of {total} batch norms converted; left as they are: {'; '.join(kinds)}"


def revert(model: Model) -> Model:
    """Undoes :func:`convert`, :func:`bn_ext.fuse` and :meth:`bn_ext.SyncBatchNorm.convert_sync_batchnorm` in place:
    every module that could have come from them has its very class again.

    Args:
        model: any module, also a copy of a converted one or a converted one unpickled.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a module that a graph calls with a residual or an activation, which torch's would not take, or one
            that :func:`bn_ext.train.freeze` or :func:`bn_ext.train.adapt` changed. Nothing is changed then.

    Example:
        >>> model = bn_ext.revert(bn_ext.convert(nn.Sequential(nn.BatchNorm2d(8))))
        >>> type(model[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    check_model("revert", model)
    for path, module in model.named_modules():
        if _original(module) is not None and isinstance(module, FusedForward):
            if module.frozen:
                raise ValueError(
                    f"revert: {path or 'the model'} is frozen, and torch's would thaw: call unfreeze first"
                )
            if module.running_share != 1:
                raise ValueError(
                    f"revert: {path or 'the model'} is adapted, as torch's cannot be: call adapt(model, 1)"
                )
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            called = node.op == "call_module" and _original(module.get_submodule(node.target)) is not None
            if called and len(node.args) + len(node.kwargs) > 1:
                raise ValueError(f"revert: {node.target} is called with a residual or an activation: torch's has none")
    unfuse(model)
    synchronized.revert(model)
    for module in model.modules():
        if (original := _original(module)) is not None:
            become(module, original)
    return model


def _original(module: nn.Module) -> type[nn.Module] | None:
    before = synchronized.unsynchronized(module)
    return classes.original(before or type_before_parametrizations(module)) or before
