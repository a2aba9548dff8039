"""Which batch norms of a model run on our kernels, what is fused with them, and why no more."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext._table import Table
from bn_ext.functional import has_kernels
from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion import classes
from bn_ext.graph.conversion.forwards import WithActivation
from bn_ext.graph.folding.fold import THE_MODEL, Fold, folds
from bn_ext.graph.fusion.installed import fusions
from bn_ext.nn.activated import BatchNormAct

if TYPE_CHECKING:
    from bn_ext.graph.fusion.rewrite import Fusion

_HEAD = ("batch norm", "class", "runs on", "fused", "reason")
_UNKNOWN = "not known"
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TENSORS = ("weight", "bias", "running_mean", "running_var")


class Row(NamedTuple):
    """One batch norm."""

    path: str  # of the module; of a functional call: of the module around it, and the name of the call
    cls: str  # the name of its class, or "function"
    runs_on: str  # "bn_ext", "torch", "not known", or "folded into" a layer
    fused: str  # what it computes besides, such as "add + relu"; "or" between what calls captured apart compute
    reason: str  # why it runs on torch, or why no more is fused


@dataclass(frozen=True, repr=False)
class Report(Table):
    """A table of batch norms, totals first."""

    rows: Sequence[Row]


def report(model: nn.Module | ExportedProgram) -> Report:
    """Which batch norms of ``model`` run on our kernels, what is fused with each of them, and why no more.

    Nothing is run, and the model is not changed. A module with several paths has one row, with the first path. Calls
    that a fused model captured, and no module makes, have rows at the end. The column of what is fused holds
    activations of batch norm classes with an activation too.

    Args:
        model: a module: plain, converted, fused or folded, or a model with such parts; or an exported program that
            :func:`bn_ext.fold` returned.

    Returns:
        A table for terminals and notebooks, totals first. Its ``rows`` are named tuples of strings: ``path``, ``cls``,
        ``runs_on``, ``fused`` and ``reason``.

    Raises:
        TypeError: ``model`` is no module, nor a program that was folded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> bn_ext.report(bn_ext.fuse(model, torch.randn(2, 3, 8, 8)))
        1 batch norm: 1 with relu
        1 on bn_ext
        batch norm  class        runs on  fused  reason
        1           BatchNorm2d  bn_ext   relu
    """
    check_model("report", model, ExportedProgram)
    if isinstance(model, ExportedProgram):
        if not (folded := folds(model)):
            raise TypeError("bn_ext.report: of exported programs only those that bn_ext.fold returned have a report")
        return _report([_of_program(fold) for fold in folded])
    found = {fold.batch_norm: fold for fold in _folds(model)}
    captured = _captured(model)
    rows = []
    for path, module in model.named_modules():
        if path in found and found[path].into:
            rows.append(Row(path, "", f"folded into {found[path].into}", "", ""))
        elif classes.is_batch_norm(module):
            rows.append(_of_module(path, module, captured.pop(path, []), found.get(path)))
    hidden = ["parts in TorchScript are not looked into"] * any(isinstance(p, ScriptModule) for p in model.modules())
    return _report(rows + [_of_function(path, calls) for path, calls in captured.items()], hidden)


def _report(rows: Sequence[Row], below: Sequence[str] = ()) -> Report:
    if not rows:
        return Report(_HEAD, (), ["no batch norm modules (calls of functions show in fused models alone)"], below)
    kinds = Counter(
        "folded" if row.runs_on.startswith("folded") else f"with {row.fused}" if row.fused else "plain" for row in rows
    )
    places = Counter(row.runs_on for row in rows if not row.runs_on.startswith("folded"))
    several = "s" if len(rows) > 1 else ""
    above = [f"{len(rows)} batch norm{several}: {_counts(kinds)}"]
    if places:
        above.append(_counts({p if p == _UNKNOWN else f"on {p}": count for p, count in places.items()}))
    return Report(_HEAD, rows, above, below)


def _counts(counts: Mapping[str, int]) -> str:
    """The largest first, the plain ones last."""
    ordered = sorted(counts.items(), key=lambda item: (item[0] == "plain", -item[1]))
    return ", ".join(f"{count} {what}" for what, count in ordered)


# ---------------------------------------------------------------------------------------------- what is known


def _folds(model: nn.Module) -> Iterable[Fold]:
    """Says what :func:`bn_ext.fold` did to the model and to its parts, by paths in the model."""
    for path, part in model.named_modules():
        for fold in folds(part):
            into = fold.into
            if path and into:
                into = path if into == THE_MODEL else _joined(path, into)
            yield Fold(_joined(path, fold.batch_norm), into, fold.reason)


def _captured(model: nn.Module) -> dict[str, list[Fusion]]:
    """Says what :func:`bn_ext.fuse` did to the model and to its parts, by paths in the model."""
    found: dict[str, list[Fusion]] = defaultdict(list)
    for path, part in model.named_modules():
        for fusion in fusions(part):
            name = "" if classes.is_batch_norm(part) else fusion.batch_norm  # a graph does not say what its model is
            found[_joined(path, name)].append(fusion)
    return found


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


# ---------------------------------------------------------------------------------------------- one row


def _of_module(path: str, module: nn.Module, calls: Sequence[Fusion], fold: Fold | None) -> Row:
    own, reason = _own_activation(module)
    seen = [call for call in calls if call.on_kernels is not None]
    obstacle = _of_tensors(module)
    runs_on, fused, why = _of_calls(seen or calls, own)
    if obstacle:
        runs_on = "torch"
    elif not seen:
        runs_on, obstacle = _of_forward(module)
        if runs_on == _UNKNOWN:
            fused = ""
    reasons = [obstacle, why or reason, f"not folded: {fold.reason}" if fold else ""]
    return Row(path, type_before_parametrizations(module).__name__, runs_on, fused, _distinct(reasons, "; "))


def _of_function(path: str, calls: Sequence[Fusion]) -> Row:
    return Row(path, "function", *_of_calls(calls, ""))


def _of_program(fold: Fold) -> Row:
    runs_on = f"folded into {fold.into}" if fold.into else "torch"
    return Row(fold.batch_norm, "function", runs_on, "", f"not folded: {fold.reason}" if fold.reason else "")


def _of_calls(calls: Sequence[Fusion], own: str) -> tuple[str, str, str]:
    """The place where captured calls of one batch norm run, what they compute besides, and why no more."""
    kinds = _distinct([" + ".join(call.fused) or own or "nothing" for call in calls] or [own], " or ")
    reasons = [] if own else [call.reason for call in calls]
    runs_on = _distinct(["bn_ext" if call.on_kernels else "torch" for call in calls], " or ")
    return runs_on, "" if kinds == "nothing" else kinds, _distinct(reasons, "; ")


def _distinct(texts: Iterable[str], between: str) -> str:
    return between.join(dict.fromkeys(filter(None, texts)))


def _own_activation(module: nn.Module) -> tuple[str, str]:
    """The activation that our class computes in the call of its batch norm, or why there is none."""
    activation: str | None = None
    if isinstance(module, BatchNormAct):
        activation = module.activation
    elif isinstance(module, WithActivation):
        found = module._activation()
        if found is None:
            return "", f"{type(module.drop).__name__} and {type(module.act).__name__} behind it have no fused form"
        activation, _ = found
    return "" if activation in (None, "identity") else activation, ""


def _of_tensors(module: nn.Module) -> str:
    """Why there are no kernels for the tensors of ``module``; empty if there are."""
    tensors = {**module._parameters, **module._buffers}
    for tensor in map(tensors.get, _TENSORS):
        if tensor is None:
            continue
        if not has_kernels(tensor.device):
            return f"there are no kernels for {tensor.device.type}"
        if tensor.dtype not in _FLOATING:
            return f"there are no kernels for {tensor.dtype}"
    return ""


def _of_forward(module: nn.Module) -> tuple[str, str]:
    """The place where the forward of ``module`` runs, and why not on our kernels."""
    if "forward" in vars(module):
        return _UNKNOWN, "its forward was replaced, and what the new one calls is not seen"
    cls = type_before_parametrizations(module)
    if classes.is_ours(module):
        becomes = getattr(cls, "cls_to_become", None) or cls  # what a lazy module is after its first input
        owner = next(base for base in becomes.__mro__ if "forward" in vars(base))
        if owner.__module__.startswith("bn_ext."):
            return "bn_ext", ""
        return _UNKNOWN, f"{owner.__name__} has a forward of its own, and what it calls is not seen"
    try:
        ours = classes.counterpart(cls)
    except classes.UnlikeError as unlike:
        return "torch", f"bn_ext.convert leaves modules of this class: {unlike}"
    trial = ", if a trial shows no difference" if issubclass(ours, classes.Counterpart) else ""
    return "torch", f"bn_ext.convert takes it{trial}"
