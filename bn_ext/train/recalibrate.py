"""Running statistics of a whole data set, pooled exactly."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bn_ext._processes import in_group
from bn_ext.nn.sync import SyncBatchNorm
from bn_ext.stages import merge_stats
from bn_ext.train.pool import Collecting, Pool, StopError
from bn_ext.train.record import Record, Row, batch_norms, record, row, statistics_of


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    sequential: bool = False,
    progress: bool = True,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Record:
    """Replaces the running statistics of ``model`` by the statistics of all ``batches``, pooled exactly.

    Running averages trail the weights, and weights that were averaged, merged, pruned or quantized have no statistics
    of their own: use it before evaluation then, with a few hundred batches of training data in the size of training.
    The mean becomes the mean of all values, the variance their unbiased variance, and the counter the number of
    batches, whatever sizes the batches have and in whatever order they come. Each batch is run once, without gradients:
    batch norms in training normalize it by its own statistics, and that call gives the moments too; every other module
    is in evaluation. Frozen batch norms stay. Over processes (an initialized :mod:`torch.distributed`) the batches of
    all are pooled: the same answer as one process with all of them. A SyncBatchNorm takes the k-th batches of all its
    processes as one, of which there have to be as many everywhere; torch's is left as it is.

    Args:
        model: any module, also fused or compiled: it runs plainly here.
        batches: tensors; tuples or lists whose first element is the input; or anything, with a ``forward``. Inputs are
            moved to the device of the model.
        sequential: one layer after the other, in the order in which they are called, each with the layers before it in
            evaluation by their new statistics. It runs the batches once for each layer, up to that layer; they must be
            the same every time.
        progress: writes the number of batches to standard error.
        forward: called with the model and a batch, instead of ``model(input)``.

    Returns:
        A record of every batch norm: values, and how far mean and variance moved. Its ``undo()`` gives the statistics
        of before back.

    Raises:
        TypeError: ``model`` is no module, or a batch no tensor, tuple or list, without a ``forward``.
        ValueError: no batches; an iterator with ``sequential``, which can be run through but once; a batch norm in
            TorchScript, or one that is not initialized; one value per channel; with a SyncBatchNorm, other numbers of
            batches in other processes. Nothing is changed then.

    Example:
        >>> model, data = nn.Sequential(nn.BatchNorm1d(2)), torch.randn(100, 2) + 3
        >>> record = bn_ext.train.recalibrate(model, data.split(32), progress=False)
        >>> torch.allclose(model[0].running_mean, data.mean(0)), torch.allclose(model[0].running_var, data.var(0))
        (True, True)
        >>> model[0].num_batches_tracked
        tensor(4)

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 2. Wu & Johnson 2021, arXiv 2105.07576, found such precise
    statistics better than running averages wherever these are unstable, with batches that are large or models that
    still move; torch.optim.swa_utils.update_bn averages the variances of batches, which leaves out what lies between
    their means and weighs unequal batches alike.
    """
    norms = batch_norms("recalibrate", model)
    pools = [Pool(path, module) for path, module in norms if not _obstacle(module)]
    if sequential and isinstance(batches, Iterator):
        raise ValueError(
            "bn_ext.train.recalibrate: sequential=True runs the batches once for each layer: give a list or a loader, "
            f"not an iterator ({type(batches).__name__})"
        )
    undo = _restoring([tensor for pool in pools for tensor in statistics_of(pool.module)])
    runs = _Runs(model, batches, forward, progress)
    try:
        with torch.no_grad(), _evaluation(model), torch.compiler.set_stance("force_eager"):
            rows = runs.one_by_one(pools) if sequential else runs.all_at_once(pools)
    except BaseException:
        undo()
        raise
    texts = (rows.get(path) or row(path, module, _obstacle(module) or "was not called") for path, module in norms)
    return record("statistics recalibrated", [*texts], undo)


class _Runs:
    """Runs of a model over batches."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], Any] | None,
        progress: bool,
    ) -> None:
        # DDP would write buffers over those of other processes, and wait for these.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.batches, self.forward, self.progress = batches, forward or _forward, progress

    def all_at_once(self, pools: Sequence[Pool]) -> dict[str, Row]:
        with _training(pools):
            self.run(Collecting(pools), "")
        return _written(pools)

    def one_by_one(self, pools: Sequence[Pool]) -> dict[str, Row]:
        by_path = {pool.path: pool for pool in pools}
        rows: dict[str, Row] = {}
        for path, calls in self.order(pools):
            pool = by_path[path]
            with _training([pool]):
                self.run(Collecting([pool], calls), f" for {path}")
            rows |= _written([pool])
        return rows

    def order(self, pools: Sequence[Pool]) -> list[tuple[str, int]]:
        """The paths of the batch norms in the order of their calls, and how often a forward calls each."""
        orders: list[Any] = [[]]
        for batch in self.met():
            trial = Collecting([Pool(pool.path, pool.module) for pool in pools])
            with _training(pools), trial:
                self.forward(self.model, batch)
            orders = [[(pool.path, calls) for pool, calls in trial.order.items()]]
            break
        if in_group():  # a process may have no batches
            (mine,) = orders
            orders = [None] * dist.get_world_size()
            dist.all_gather_object(orders, mine)
        found: list[tuple[str, int]] = next(filter(None, orders), [])
        if not found and pools:
            raise ValueError(_NO_BATCHES)
        return found

    def met(self) -> Iterator[Any]:
        """The batches. Processes whose batch norms are synchronized have to have as many: they wait for each other."""
        if not in_group() or not any(isinstance(module, SyncBatchNorm) for module in self.model.modules()):
            yield from self.batches
            return
        given, end = iter(self.batches), object()
        while True:
            batch = next(given, end)
            here = torch.tensor([float(batch is not end)])
            if dist.get_backend() != "gloo":
                here = here.to(next(self.model.buffers()).device)
            dist.all_reduce(here)
            if 0 < here.item() < dist.get_world_size():
                raise ValueError(
                    "bn_ext.train.recalibrate: processes have different numbers of batches, and a SyncBatchNorm in the "
                    "model takes one of each: give every process as many, or revert_sync_batchnorm first"
                )
            if batch is end:
                return
            yield batch

    def run(self, collecting: Collecting, what: str) -> None:
        for number, batch in enumerate(self.met(), 1):
            collecting.order.clear()
            try:
                with collecting:
                    self.forward(self.model, batch)
            except StopError:
                pass
            if self.progress:
                sys.stderr.write(f"\rrecalibrate: {number} batches{what}")
        if self.progress:
            sys.stderr.write("\n")


_NO_BATCHES = "bn_ext.train.recalibrate: there are no batches, or none of them reaches a batch norm"


def _forward(model: nn.Module, batch: Any) -> Any:
    input = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(input, Tensor):
        raise TypeError(
            "bn_ext.train.recalibrate: a batch should be a tensor, or a tuple or list that begins with one, got "
            f"{type(batch).__name__}: say how to call the model, by forward=lambda model, batch: ..."
        )
    tensor = next((t for group in (model.parameters(), model.buffers()) for t in group), input)
    return model(input.to(tensor.device))


def _obstacle(module: nn.Module) -> str:
    """Why the statistics of a batch norm are left alone; empty if they are not."""
    mean = module._buffers.get("running_mean")
    if mean is None:
        return "has no statistics"
    if mean.dim() > 1:
        return "left: it has statistics of several domains"
    if getattr(module, "frozen", False) or not hasattr(module, "track_running_stats"):
        return "is frozen"
    if not module.track_running_stats:
        return "tracks no statistics"
    return "left: it spans processes by itself" if isinstance(module, nn.SyncBatchNorm) else ""


def _written(pools: Sequence[Pool]) -> dict[str, Row]:
    """Writes the pooled statistics to the modules. Returns what has changed, by path."""
    everyones = [pool.gathered() for pool in pools]
    if pools and not any(pool.calls for pool in everyones):
        raise ValueError(_NO_BATCHES)
    return {pool.path: row(pool.path, pool.module, _write(pool)) for pool in everyones if pool.calls}


def _write(pool: Pool) -> str:
    if pool.moments.counts < 2:
        raise ValueError(f"bn_ext.train.recalibrate: {pool.path} got one value per channel in all")
    mean, var, *counter = statistics_of(pool.module)
    new_mean, new_var = (torch.zeros_like(t, dtype=torch.float64) for t in (mean, var))
    merge_stats(pool.moments, new_mean, new_var, momentum=1.0)
    shift = ((new_mean - mean) / new_var.sqrt()).abs().max()
    ratio = new_var / var
    mean.copy_(new_mean)
    var.copy_(new_var)
    for tensor in counter:
        tensor.fill_(pool.calls)
    values = f"{int(pool.moments.counts)} values of {pool.calls} batches"
    return f"{values}: mean moved {shift:.2g} deviations at most, variance times {ratio.min():.2g} to {ratio.max():.2g}"


def _restoring(tensors: Sequence[Tensor]) -> Callable[[], None]:
    before = [tensor.clone() for tensor in tensors]

    def restore() -> None:
        with torch.no_grad():
            for tensor, earlier in zip(tensors, before):
                tensor.copy_(earlier)

    return restore


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Flags alone: a frozen batch norm would note another mode."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _training(pools: Sequence[Pool]) -> Iterator[None]:
    for pool in pools:
        pool.module.training = True
    try:
        yield
    finally:
        for pool in pools:
            pool.module.training = False
