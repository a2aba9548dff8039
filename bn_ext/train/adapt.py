"""Evaluation that follows the data of the test."""

from __future__ import annotations

import warnings

from torch import nn

from bn_ext.graph.conversion.convert import make_ours
from bn_ext.nn.base import FusedForward
from bn_ext.train.record import Record, batch_norms, record, row

_SHARE = "running_share"


def adapt(model: nn.Module, alpha: float) -> Record:
    """Has batch norms in evaluation normalize by ``alpha * running + (1 - alpha) * batch`` statistics.

    Use it where the data of the test are unlike those of training (corrupted, from another camera or site) and come in
    batches: ``alpha=0`` for large batches, otherwise about N / (N + n) for n images, with N, what the running
    statistics are worth, tuned (8 to 512 in the literature). It takes effect in evaluation alone, so that dropout and
    everything else stay there, and running statistics are read but never written. Gradients go through the batch's
    part, as methods that train weight and bias on the test data need. Batch norms become ours first
    (:func:`bn_ext.convert`), the same objects with the same ``state_dict``; copies and pickles stay adapted.
    ``adapt(model, 1)`` undoes it.

    Do not use it with batches of a single class, or sorted ones: the batch's statistics are then those of the class.

    Args:
        model: any module, fused ones too: adapted batch norms run as calls of their own.
        alpha: the share of the running statistics in mean and variance, from 0 to 1.

    Returns:
        A record of every batch norm. Its ``undo()`` gives each the share that it had.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an ``alpha`` outside of 0 to 1; a batch norm in TorchScript, or one that is not initialized.
        RuntimeError: in a call, by TorchScript, which has no form of it; a second derivative with a residual
            and an activation that keeps but bits of it, such as relu.

    Example:
        >>> model, x = nn.Sequential(nn.BatchNorm1d(2)).eval(), torch.randn(100, 2) + 3
        >>> record = bn_ext.train.adapt(model, 0.0)
        >>> model(x).mean().abs() < 1e-5
        tensor(True)
        >>> record = bn_ext.train.adapt(model, 1)
        >>> model(x).mean() > 2
        tensor(True)

    Source: Schneider et al. 2020, arXiv 2006.16971, mixes both by batch size; Nado et al. 2020, arXiv 2006.10963, takes
    the batch's alone; Wang et al. 2021 (Tent), arXiv 2006.10726, trains weight and bias besides. Wanted as tent#17,
    where the whole model had to be in training mode for it.
    """
    norms = batch_norms("adapt", model)
    if not 0 <= alpha <= 1:
        raise ValueError(f"bn_ext.train.adapt: alpha should be from 0 to 1, got {alpha}")
    if left := make_ours(model):
        warnings.warn(f"bn_ext.train.adapt: {left}", stacklevel=2)
    before, rows = [], []
    for path, module in norms:
        if not isinstance(module, FusedForward):
            changed = "left as it is: it has a forward of its own"
        elif not module.mixes:
            changed = "left as it is: its statistics are not of each channel's own values"
        elif module.running_mean is None:
            changed = "has no statistics: normalizes by the batch"
        else:
            before.append((module, module.running_share))
            _share(module, float(alpha))
            changed = f"evaluates by {alpha:g} running + {1 - alpha:g} batch statistics"
        rows.append(row(path, module, changed))

    def undo() -> None:
        for module, share in before:
            _share(module, share)

    return record("batch norms adapted", rows, undo)


def _share(module: FusedForward, share: float) -> None:
    vars(module).pop(_SHARE, None)
    if share != 1:
        vars(module)[_SHARE] = share
