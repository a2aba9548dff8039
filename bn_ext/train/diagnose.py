"""Finds in a model and its training what is known to go badly with batch norm."""

from __future__ import annotations

from typing import Any

from torch import nn

from bn_ext.graph.arguments import check_model
from bn_ext.train.diagnosis.finding import Findings
from bn_ext.train.diagnosis.rules import RULES
from bn_ext.train.diagnosis.subject import FUNCTION, Subject


def diagnose(
    model: nn.Module, optimizer: Any = None, example: Any = None, batches: Any = None, accumulation: int = 1
) -> Findings:
    """Finds what is known to go badly with batch norm, in ``model`` and in how it is trained.

    Use it before a long training, and where evaluation is worse than training. It looks at batch norms of torch, timm,
    torchvision, transformers and ours, converted and fused or not. Every finding says what the literature found, also
    where results differ: it is a thing to look at, not always a mistake. The kinds of findings, and what they need:

    - a bias that batch norm subtracts, dropout before batch norm, batch norm after the nonlinearity: the order of
      calls. ``example`` shows it; without, :mod:`torch.fx` traces the model, or those of its parts that it can;
    - few values per channel in training, fewer than 32: ``example``;
    - weight decay on weight and bias: ``optimizer``;
    - statistics never updated: nothing; to find a batch norm that is not called, ``example``;
    - a momentum that sees too few batches: above 0.5 nothing; so low that after all batches more than 1 % is left of
      the statistics before, ``batches``;
    - gradient accumulation beside batch norm: ``accumulation``;
    - batches under DistributedDataParallel of fewer than 16 images, without SyncBatchNorm: the wrapped model, and
      ``example`` or a loader with a batch size.

    Batch norms that are frozen, by class or mode, are left out where only statistics of batches matter. A model that is
    in evaluation mode as a whole is looked at as ``model.train()`` would make it.

    The forward is that of a copy, in training mode without gradients. ``model``, its buffers, gradients, hooks and the
    random states stay as they are; hooks of the model run once, as in any forward. Parts in TorchScript are not looked
    into.

    Args:
        model: any module; also in DistributedDataParallel, DataParallel or as torch.compile returns it.
        optimizer: what trains it, or anything with ``param_groups``.
        example: an input as in training, of its batch size in one process. A tuple holds positional inputs, a dict
            inputs by name; anything else is the only input.
        batches: how many batches the training goes through in all; or a loader, whose length counts, one epoch.
        accumulation: how many batches' gradients are added up for a step of the optimizer.

    Returns:
        A list of named tuples of strings, ``path``, ``what``, ``why``, ``remedy`` and ``source``, that prints as a
        table. It is empty if there is nothing to say.

    Raises:
        TypeError: ``model`` is no module, or cannot be copied; an argument of another type.
        ValueError: ``model`` is not initialized; a number below 1.
        Exception: whatever the model raises with ``example``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> found = bn_ext.train.diagnose(model, example=torch.randn(16, 3, 8, 8), batches=20)
        >>> [(finding.path, finding.what) for finding in found]
        [('0', 'bias of Conv2d before batch norm'), ('1', 'a momentum of 0.1 leaves 12% of the old after 20 batches')]
    """
    check_model("train.diagnose", model)
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(f"{FUNCTION}: optimizer should have param_groups, got {type(optimizer).__name__}")
    if batches is not None:
        number = len(batches) if hasattr(batches, "__len__") else batches
        _check_number("batches", number, "a number or a loader with a length")
    _check_number("accumulation", accumulation, "a number")
    subject = Subject(model, optimizer, example, batches, accumulation)
    return Findings(finding for rule in RULES for finding in rule.findings(subject))


def _check_number(name: str, given: Any, expected: str) -> None:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"{FUNCTION}: {name} should be {expected}, got {type(given).__name__}")
    if given < 1:
        raise ValueError(f"{FUNCTION}: {name} should be 1 or more, got {given}")
