"""Batch norms that stay in evaluation when the model trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from bn_ext.graph.conversion.convert import make_ours
from bn_ext.nn.base import FREEZING, FusedForward
from bn_ext.train.record import Record, batch_norms, record, row


def freeze(model: nn.Module, affine: bool = True) -> Record:
    """Freezes the batch norms of ``model``: they normalize by their running statistics whatever mode the model is in.

    Use it to fine-tune with few images in a batch or on data unlike the first, and for a backbone that is not trained:
    ``eval()`` alone holds until the next ``model.train()``. Batch norms become ours first (:func:`bn_ext.convert`), the
    same objects with the same ``state_dict``. They stay frozen in copies, pickles and scripts, and :func:`unfreeze` is
    the only way back. With frozen parameters a layer keeps nothing of the input's size for the backward (one bit an
    element if relu follows), and its backward is one read and one write.

    Freeze before the optimizer and DistributedDataParallel are made, and after a conversion by torch.nn.SyncBatchNorm,
    which would undo it; the one by :class:`bn_ext.SyncBatchNorm` does not.

    Args:
        model: any module.
        affine: whether weight and bias stay, too: they no longer require gradients, and lose those that they have, so
            that no optimizer moves them. With False they train as before.

    Returns:
        A record of every batch norm. Its ``undo()`` takes back this call, but for the conversion. One warning names the
        batch norms that cannot be converted and so are not frozen.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm in TorchScript, or one that is not initialized.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> bn_ext.train.freeze(model)
        batch norms frozen
        batch norm  class        changed
        1           BatchNorm1d  statistics, weight and bias stay
        >>> y = model.train()(torch.randn(16, 4))
        >>> model[1].running_mean.any(), model[1].weight.requires_grad
        (tensor(False), False)

    Source: wanted as pytorch#66073, #86590 and #39674; "frozen" layers that thaw, in gt-pyg#112, CenterPoint#168 and
    others. Detectors have been fine-tuned so since Faster R-CNN on ResNets (He et al. 2016), because two images a GPU
    give statistics that are too noisy; Wu & Johnson 2021, arXiv 2105.07576, found that late in training frozen
    statistics also lessen the difference between training and test.
    """
    norms = batch_norms("freeze", model)
    if left := make_ours(model):
        warnings.warn(f"bn_ext.train.freeze: {left}", stacklevel=2)
    undoings: list[Callable[[], None]] = []
    rows = []
    for path, module in norms:
        if isinstance(module, FusedForward):
            undoings.append(_restoring(module))
            rows.append(row(path, module, _freeze(module, affine)))
        else:
            rows.append(row(path, module, _left(module)))

    def undo() -> None:
        for restore in undoings:
            restore()

    return record("batch norms frozen", rows, undo)


def unfreeze(model: nn.Module) -> Record:
    """Undoes :func:`freeze`: statistics follow the batches again, in the mode that the model was last given, and the
    parameters that it froze require gradients. The batch norms stay ours.

    Args:
        model: any module, also a copy of a frozen one, or a frozen one unpickled.

    Returns:
        A record of every batch norm. Its ``undo()`` freezes again what this call thawed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm in TorchScript, or one that is not initialized.

    Example:
        >>> model = nn.Sequential(bn_ext.BatchNorm1d(8))
        >>> frozen = bn_ext.train.freeze(model)
        >>> bn_ext.train.unfreeze(model)
        batch norms thawed
        batch norm  class        changed
        0           BatchNorm1d  statistics, weight and bias train
        >>> model[0].training, model[0].weight.requires_grad
        (True, True)
    """
    undoings: list[Callable[[], None]] = []
    rows = []
    for path, module in batch_norms("unfreeze", model):
        changed = "was not frozen"
        if isinstance(module, FusedForward) and module.frozen:
            undoings.append(_restoring(module))
            changed = _thaw(module)
        rows.append(row(path, module, changed))

    def undo() -> None:
        for restore in undoings:
            restore()

    return record("batch norms thawed", rows, undo)


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias by name, or what they are computed from."""
    found = {name: p for name, p in module._parameters.items() if p is not None}
    parametrizations = module._modules.get("parametrizations")
    if parametrizations is not None:
        found.update(parametrizations.named_parameters())
    return found


def _freeze(module: FusedForward, affine: bool) -> str:
    own = vars(module)
    if not module.frozen:
        own.update(frozen=True, _thawed_training=module.training, _thawed_parameters=())
        module.training = False
    stay = ["statistics"] if module.running_mean is not None else []
    for name, parameter in _parameters(module).items() if affine else ():
        stay.append(name)
        if parameter.requires_grad:
            own["_thawed_parameters"] += (name,)
            parameter.requires_grad_(False).grad = None
    return _sentence(stay, "stay")


def _thaw(module: FusedForward) -> str:
    own = vars(module)
    del own["frozen"]
    module.training = own.pop("_thawed_training")
    names = own.pop("_thawed_parameters")
    parameters = _parameters(module)
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_()
    return _sentence((["statistics"] if module.running_mean is not None else []) + [*names], "train")


def _restoring(module: FusedForward) -> Callable[[], None]:
    """Notes what freezing changes. The function that it returns restores it."""
    own: dict[str, Any] = {name: value for name, value in vars(module).items() if name in FREEZING}
    training = module.training
    requires = {name: p.requires_grad for name, p in _parameters(module).items()}

    def restore() -> None:
        for name in FREEZING:
            vars(module).pop(name, None)
        vars(module).update(own)
        module.training = training
        for name, parameter in _parameters(module).items():
            parameter.requires_grad_(requires[name])

    return restore


def _left(module: nn.Module) -> str:
    """Why a batch norm that is not ours is not frozen."""
    tracks = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return "left as it is: bn_ext.convert does not take it" if tracks else "is frozen by its class"


def _sentence(subjects: list[str], verb: str) -> str:
    *first, last = subjects or ["nothing"]
    return f"{', '.join(first)} and {last} {verb}" if first else f"{last} {verb}"
