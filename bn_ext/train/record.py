"""The record that each helper returns, and the batch norms that it is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext._table import Table
from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion import classes

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_HEAD = ("batch norm", "class", "changed")


class Row(NamedTuple):
    """One batch norm."""

    path: str  # of the module in the model
    cls: str  # the name of its class
    changed: str  # in words, or why nothing was


def _nothing() -> None:
    """Undoes what changed nothing."""


@dataclass(frozen=True, repr=False)
class Record(Table):
    """A table, for terminals and notebooks, of the changes that a helper made to each batch norm of a model.

    ``rows`` are named tuples of strings: ``path``, ``cls`` and ``changed``. ``undo()`` takes back what this call did.
    """

    rows: Sequence[Row]
    undo: Callable[[], None] = _nothing


def record(title: str, rows: Sequence[Row], undo: Callable[[], None] = _nothing) -> Record:
    return Record(_HEAD, rows, [title], undo=undo)


def row(path: str, module: nn.Module, changed: str) -> Row:
    return Row(path, type_before_parametrizations(module).__name__, changed)


def batch_norms(function: str, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The batch norms of ``model`` with their paths, for a helper of this name.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm is in TorchScript, which no helper reaches, or has no sizes yet.
    """
    check_model(f"train.{function}", model)
    found = []
    for path, module in model.named_modules():
        if isinstance(module, ScriptModule) and any(
            name == "running_mean" for name, _ in module.named_buffers(recurse=False)
        ):
            raise ValueError(
                f"bn_ext.train.{function}: {path or 'the model'} is in TorchScript, where it cannot be changed: script "
                "the model afterwards"
            )
        if classes.is_batch_norm(module):
            if any(tensor is not None and is_lazy(tensor) for tensor in tensors_of(module)):
                raise ValueError(
                    f"bn_ext.train.{function}: {path or 'the model'} is not initialized: run one batch first"
                )
            found.append((path, module))
    return found


def tensors_of(module: nn.Module) -> list[Tensor | None]:
    return [*module._parameters.values(), *module._buffers.values()]


def statistics_of(module: nn.Module) -> list[Tensor]:
    """Running statistics and counter, those that there are."""
    found = (module._buffers.get(name) for name in STATISTICS)
    return [tensor for tensor in found if tensor is not None]
