"""Forwards in training that leave running statistics alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bn_ext.train.calls import arguments
from bn_ext.train.record import Record, batch_norms, record, row

_KEPT = "running statistics and counter stay"
_NONE = {"running_mean": None, "running_var": None, "num_batches_tracked": None, "momentum": 0.0}


class _Without(TorchFunctionMode):
    """Calls functions in training without their running statistics, if these are among some tensors."""

    def __init__(self, kept: Sequence[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = arguments(func, args, kwargs)
        if given is not None and given.get("training"):
            mean = given.get("running_mean")
            if any(mean is tensor for tensor in self.kept):
                return func(**{name: _NONE.get(name, value) for name, value in given.items()})
        return func(*args, **kwargs)


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[Record]:
    """A context in which forwards of ``model`` leave running statistics and batch counters alone.

    Batch norms in training normalize by their batch as ever. Use it for every forward that is no training step: the
    warm-up runs before a CUDA graph is captured, a second loss on the same or on other data, the inner steps of
    meta-learning, a validation loss in training mode. The modules themselves write to nothing, so it holds for
    eager calls, fused models and compiled code: Dynamo guards on what it changes, and compiles once for inside and once
    for outside. ``F.batch_norm`` with buffers of the model is covered too.

    A checkpointed part runs again in the backward: call the backward inside too, or checkpoint with
    :func:`bn_ext.checkpoint_contexts`. A CUDA graph that is captured inside never updates the statistics.

    Args:
        model: any module with batch norms of torch, its ecosystem or ours.

    Returns:
        A context. It gives a record of the batch norms that it reaches.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a batch norm in TorchScript, or one that is not initialized.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> with bn_ext.train.keep_statistics(model):
        ...     loss = model(torch.randn(16, 4)).square().mean()
        >>> model[1].num_batches_tracked
        tensor(0)

    Source: an extra forward that counts a batch twice is reported again and again, in YOLO-Master#262, Samudra#572,
    LibreYOLO#671 (a CUDA graph's warm-up), fairscale#1035 and others.
    """
    norms = batch_norms("keep_statistics", model)
    # In training, modules without this flag neither read nor write their statistics; in evaluation it is not read.
    flagged = [(path, module) for path, module in norms if hasattr(module, "track_running_stats")]
    before = [(module, module.track_running_stats) for _, module in flagged]
    by_flag = {id(tensor) for _, module in flagged for tensor in module.buffers(recurse=False)}
    others = [tensor for tensor in model.buffers() if id(tensor) not in by_flag and tensor.is_floating_point()]

    def restore() -> None:
        for module, tracks in before:
            module.track_running_stats = tracks  # type: ignore[assignment]

    for module, _ in before:
        module.track_running_stats = False  # type: ignore[assignment]
    try:
        with _Without(others) if others else nullcontext():
            yield record("statistics kept", [row(path, module, _KEPT) for path, module in norms], restore)
    finally:
        restore()
