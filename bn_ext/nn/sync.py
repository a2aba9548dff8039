"""Batch norm over the batches of several processes."""

from __future__ import annotations

import copy
import zlib
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _NormBase

from bn_ext.functional import exporting, not_exportable
from bn_ext.nn.activated import BatchNormAct
from bn_ext.nn.batch_norm import _FusedBatchNorm
from bn_ext.nn.composed import Rule, check_training, move_statistics, transformed
from bn_ext.nn.ranks import agree, check_group, check_join, ranks_of
from bn_ext.nn.spread import Merged, Spread
from bn_ext.stages import Moments, weights_of

Model = TypeVar("Model", bound=nn.Module)
Weighting = Literal["samples", "ranks"]


class SyncBatchNorm(_FusedBatchNorm):
    """Batch norm whose statistics in training are those of the batches of all processes of a group.

    The constructor is that of :class:`torch.nn.SyncBatchNorm`, and so are the names of parameters and buffers; the call
    is that of :class:`BatchNorm2d`. It runs on any device and backend of :mod:`torch.distributed`, with one collective
    in the forward and one in the backward of a call in training, of 2 C and some numbers in float64, and none in
    evaluation. The statistics of the processes are merged in the order of their ranks, which gives every process the
    same bits. Each process may have a batch of any size, also an empty one, which takes part in every collective.
    Gradients of weight and bias are those of the process's own batch, for DistributedDataParallel to average.

    In a group of one process, or without :func:`torch.distributed.init_process_group`, it computes what
    :class:`BatchNorm2d` does. It is no subclass of torch's classes: DistributedDataParallel refuses
    torch.nn.SyncBatchNorm on the CPU, and converters of others leave this class alone.

    Args:
        num_features: C, the number of channels.
        eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.
        process_group: the processes whose batches are one, or None for all.
        weighting: ``"samples"``: every value counts alike, as in one process with the whole batch. ``"ranks"``: every
            process that has values counts alike.
        bias: whether there is a bias beside the weight; torch 2.13.

    Shape:
        - input, residual, output: (N, C, *), of any strides. All but C may differ between processes.
        - mask: (N, *).
        - lengths: (N,), for inputs (N, C, L).

    Raises:
        TypeError: a ``process_group`` that is none.
        ValueError: a ``weighting`` that is none; in a call, an input of fewer than two dimensions; in training, a
            process that is not in its group, or that comes with another layer than the others; what
            :class:`BatchNorm2d` refuses, but for one value per channel in a process.
        RuntimeError: in training over several processes, after the group's timeout, processes that do not come;
            :meth:`torch.nn.parallel.DistributedDataParallel.join` without ``throw_on_early_termination``; an export, a
            trace, TorchScript, torch.func or forward-mode AD; a second derivative with a residual and an activation
            such as relu; in a call, as :class:`BatchNorm2d`.
        NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.SyncBatchNorm(8)
        >>> x, residual = torch.randn(2, 4, 8, 5, 5)
        >>> torch.equal(bn(x, residual, activation="relu"), bn_ext.BatchNorm2d(8)(x, residual, activation="relu"))
        True

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, over processes; Peng et al. 2017, arXiv 1711.07240. Statistics are
    merged as by Chan, Golub & LeVeque 1979.
    """

    __constants__ = [*_FusedBatchNorm.__constants__, "weighting"]  # noqa: RUF012

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        weighting: Weighting = "samples",
        **options: Any,
    ) -> None:
        check_group(process_group)
        check_weighting(weighting)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.synchronize(process_group, weighting)

    def synchronize(self, process_group: Any, weighting: Weighting, path: str = "") -> None:
        """Sets what a synchronized batch norm has besides the attributes of a plain one."""
        self.process_group = process_group
        self.weighting = weighting
        self.path = path  # in the model that was converted
        self.key = zlib.crc32(f"{path}:{self.num_features}".encode())

    @classmethod
    def convert_sync_batchnorm(
        cls, module: Model, process_group: Any = None, weighting: Weighting = "samples"
    ) -> Model:
        """Makes the batch norms in a model (itself included) synchronized ones.

        It takes torch's, timm's and ours, with an activation or without, converted or fused, and torch's and timm's
        synchronized ones. Modules stay the same objects with the same parameters, buffers, hooks and flags; what is
        fused behind them in training runs as a call of its own. Frozen ones need no other statistics, and stay frozen.
        One warning names the classes that are left as they are. :func:`bn_ext.revert` leads back.

        Args:
            module: any module.
            process_group: the processes whose batches are one, or None for all.
            weighting: as of the class.

        Returns:
            ``module``.

        Raises:
            TypeError: ``module`` is no module, ``process_group`` no group.
            ValueError: a ``weighting`` that is none; a batch norm that is not initialized. Nothing is changed then.
        """
        from bn_ext.graph.conversion import synchronized

        return synchronized.convert(module, process_group, weighting)

    @classmethod
    def revert_sync_batchnorm(cls, module: Model) -> Model:
        """Undoes :meth:`convert_sync_batchnorm`, in place: each module has the class that it had, ours or another's.

        Args:
            module: any module, also a copy of a converted one or a converted one unpickled. What was made a
                SyncBatchNorm by its constructor stays one.

        Returns:
            ``module``.

        Raises:
            TypeError: ``module`` is no module.
        """
        from bn_ext.graph.conversion import synchronized

        return synchronized.revert(module)

    def extra_repr(self) -> str:
        weighting = "" if self.weighting == "samples" else f", weighting={self.weighting}"
        return f"{_NormBase.extra_repr(self)}{weighting}, bn_ext{self._changed()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Copies have the same group: a group has no copies."""
        memo[id(self.process_group)] = self.process_group
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _rule(self, input: Tensor, mask: Tensor | None) -> Rule | None:
        if not self.training or self.frozen:
            return super()._rule(input, mask)
        ranks = ranks_of(self.process_group, input.device)
        if ranks.number == 1:
            return None
        self._check_input_dim(input)
        check_training(input, self.num_features, self.eps)
        name = f"{type(self).__name__} {self.path}".rstrip()
        if exporting():
            raise not_exportable(f"{name} over several processes", "call eval() first")
        if transformed():
            raise RuntimeError(
                f"{name} has no torch.func transforms, forward-mode AD or traces in training over several processes: "
                "call eval() first, or use bn_ext.BatchNorm2d, to which bn_ext.revert and bn_ext.convert lead back"
            )
        layer = f"{name} of {self.num_features} channels"
        if not is_compiling():
            check_join(layer)
            agree(self, layer, ranks)
        by_ranks = self.weighting == "ranks"
        return Spread(ranks, layer, 2 * self.key + by_ranks, by_ranks, self.eps, weights_of(mask, input))

    def _move(self, moments: Moments, running_mean: Tensor) -> None:
        values = moments.values if isinstance(moments, Merged) else None
        move_statistics(
            Moments(*moments[:3]), running_mean, self.running_var, self.num_batches_tracked, self.momentum, values
        )

    def _for_training(self, input: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None]:
        if is_scripting():
            raise RuntimeError("TorchScript has no form of SyncBatchNorm in training: script in evaluation")
        return self.weight, self.bias, None


class SyncBatchNormAct(SyncBatchNorm, BatchNormAct):
    """A synchronized batch norm and an activation as one module: what conversion makes of :class:`BatchNormAct2d`."""

    __constants__ = [*SyncBatchNorm.__constants__, *BatchNormAct.__constants__]  # noqa: RUF012
    forward = BatchNormAct.forward  # type: ignore[assignment]
    extra_repr = BatchNormAct.extra_repr


def check_weighting(weighting: Any) -> None:
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting should be 'samples' or 'ranks', got {weighting!r}")
