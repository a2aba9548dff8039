"""Between torch's batch norm modules and ours, in place."""

from __future__ import annotations

from typing import TypeVar

import torch

from bn_ext import modules

Model = TypeVar("Model", bound=torch.nn.Module)

_OURS: dict[type, type] = {
    torch.nn.BatchNorm1d: modules.BatchNorm1d,
    torch.nn.BatchNorm2d: modules.BatchNorm2d,
    torch.nn.BatchNorm3d: modules.BatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(model: Model) -> Model:
    """Makes every :class:`torch.nn.BatchNorm1d`, ``2d`` and ``3d`` in ``model`` (itself included) ours.

    The modules stay the same objects with the same parameters, buffers, hooks and flags; only their class changes.
    Subclasses, whose forward may be their own, and :class:`torch.nn.SyncBatchNorm`, whose statistics span processes,
    are left as they are.

    Returns:
        ``model``.
    """
    return _with_classes(model, _OURS)


def revert(model: Model) -> Model:
    """Undoes :func:`convert`: every module of ours in ``model`` becomes torch's again, in place. Returns ``model``."""
    return _with_classes(model, _TORCHS)


def _with_classes(model: Model, classes: dict[type, type]) -> Model:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model
