"""Batches with Inf or NaN that leave running statistics as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext.graph.conversion.classes import become
from bn_ext.train.record import Record, batch_norms, record, row, statistics_of

_SKIPS = "batches that are not finite are skipped"
_CLASSES: dict[type, type] = {}


class _Skipping(nn.Module):
    """A batch norm that takes back what a call did to its statistics, unless they are finite then.

    The class of a module changes, not a hook is added, because Dynamo guards on classes.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        statistics = statistics_of(self)
        if not self.training or not statistics:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        before = [tensor.clone() for tensor in statistics]
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        # The backward of torch's batch norm saves them, and reads none in training.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(statistics)):
            finite = torch.stack([tensor.isfinite().all() for tensor in statistics]).all()
            for tensor, earlier in zip(statistics, before):
                tensor.copy_(torch.where(finite, tensor, earlier))
        return output


def _skipping(cls: type) -> type:
    """The class that skips, one for each class of batch norms."""
    if issubclass(cls, _Skipping):
        return cls
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (_Skipping, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return _CLASSES[cls]


@contextmanager
def skip_nonfinite(model: nn.Module) -> Iterator[Record]:
    """A context in which a batch with Inf or NaN leaves running statistics and batch counters as they were.

    Use it around training steps in mixed precision: a gradient scaler skips the optimizer's step of a batch that
    overflowed, but the running statistics have taken the Inf in by then, and evaluation gives NaN ever after. Each
    batch norm decides for itself, by whether its statistics would be finite: layers before the first Inf count the
    batch. Outputs and gradients are those of the batch, so the scaler sees it still. The decision is made on the
    device: nothing waits for it, and it can be captured in a CUDA graph.

    It holds for eager calls, fused models and compiled code; Dynamo compiles once more for inside. Statistics that are
    not finite before stay so: see :func:`recalibrate`. Copies that are made inside skip for good.

    Args:
        model: any module with batch norms of torch, its ecosystem or ours.

    Returns:
        A context. It gives a record of the batch norms that it reaches.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm in TorchScript, or one that is not initialized.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2))
        >>> with bn_ext.train.skip_nonfinite(model):
        ...     y = model(torch.tensor([[1.0, float("inf")], [2.0, 3.0]]))
        >>> model[0].running_mean, model[0].num_batches_tracked
        (tensor([0., 0.]), tensor(0))

    Source: pytorch#90342, #115500 (open) and #96798: one Inf in one batch under autocast spoils a model for good.
    """
    norms = [(path, module) for path, module in batch_norms("skip_nonfinite", model) if statistics_of(module)]
    before = [(module, type_before_parametrizations(module)) for _, module in norms]

    def restore() -> None:
        for module, cls in before:
            become(module, cls)

    try:
        for module, cls in before:
            become(module, _skipping(cls))
        yield record("batches skipped", [row(path, module, _SKIPS) for path, module in norms], restore)
    finally:
        restore()
