"""The modules: torch's own in everything but the forward call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bn_ext import activation as activations
from bn_ext._fallback import fell_back
from bn_ext.functional import EXPORTED, as_tensor, check, exporting, finished, operator


class Ours(torch.nn.Module):
    """A module of ours, or one that will become ours: its repr says so."""

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), "bn_ext")))


class _FusedForward(Ours, _NormBase):
    """Statistics, normalization, residual, activation, running statistics and batch counter in one operator call."""

    def _traced(self, input: Any, **options: Any) -> Any:
        """Records a call of this module in a torch.fx graph. torch.fx by itself does so for torch.nn's modules only."""
        given = {name: value for name, value in options.items() if value is not None}
        return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), given)

    def _fused(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: activations.Name | None,
        activation_param: float | None,
    ) -> Tensor:
        if not is_scripting():
            check(input, activation, activation_param)
            residual = as_tensor(residual, input)
            if exporting():
                fell_back(input, EXPORTED)
                return finished(_BatchNorm.forward(self, input), residual, activation, activation_param)  # type: ignore[arg-type]
        self._check_input_dim(input)
        running_mean, running_var = self.running_mean, self.running_var
        num_batches_tracked: Tensor | None = None
        momentum: float | None = self.momentum
        if not self.training:
            training = running_mean is None and running_var is None
        else:
            training = True
            if self.track_running_stats:
                num_batches_tracked = self.num_batches_tracked
            else:
                running_mean = running_var = None
        if num_batches_tracked is None and momentum is None:
            momentum = 0.0
        return operator(
            input,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            self.eps,
            residual,
            activation,
            activation_param,
        )


class _FusedBatchNorm(_FusedForward):
    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: activations.Name | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        if not is_scripting():  # noqa: SIM102, which would have TorchScript compile what is inside
            if isinstance(input, Proxy):
                return self._traced(input, residual=residual, activation=activation, activation_param=activation_param)
        return self._fused(input, residual, activation, activation_param)


class BatchNorm1d(_FusedBatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels, and what follows the normalization in the same pass.

    The call takes a residual and an activation, as :class:`BatchNorm2d` does.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).

    Raises:
        ValueError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.BatchNorm1d(8)
        >>> x, residual = torch.randn(2, 4, 8, 5)
        >>> bn(x, residual, activation="relu").shape
        torch.Size([4, 8, 5])
    """


class BatchNorm2d(_FusedBatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels, and what follows the normalization in the same pass.

    ``module(input, residual, activation="relu", activation_param=None)`` gives
    ``activation(batch_norm(input) + residual)``; each of the three is optional, as in
    :func:`bn_ext.functional.batch_norm`. They belong to the call, so that torch's class in the place of this one raises
    TypeError where it would drop them.

    Args:
        num_features: C, the number of channels.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics, or None for their cumulative average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics, by which evaluation normalizes. Without them it
            normalizes by the statistics of its own batch.
        device, dtype: of parameters and buffers.

    Shape:
        - input, residual, output: (N, C, H, W), of any strides.

    Raises:
        ValueError: in a call, an input of another rank; in training, one value per channel, or ``eps`` not positive; an
            unknown activation, or a parameter for one that has none.
        RuntimeError: in a call, other than ``num_features`` channels; a dtype or device that does not fit the input.
        NotImplementedError: in a call, an input that is not of a floating dtype.

    Example:
        >>> bn = bn_ext.BatchNorm2d(8)
        >>> x, residual = torch.randn(2, 4, 8, 5, 5)
        >>> bn(x, residual, activation="relu").shape
        torch.Size([4, 8, 5, 5])
    """


class BatchNorm3d(_FusedBatchNorm, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on fused kernels, and what follows the normalization in the same pass.

    The call takes a residual and an activation, as :class:`BatchNorm2d` does.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.

    Raises:
        ValueError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.BatchNorm3d(8)
        >>> x, residual = torch.randn(2, 4, 8, 2, 5, 5)
        >>> bn(x, residual, activation="relu").shape
        torch.Size([4, 8, 2, 5, 5])
    """


class BatchNormAct(_FusedForward):
    """The base of the three classes of batch norm with an activation."""

    __constants__ = [*_NormBase.__constants__, "activation", "activation_param"]  # noqa: RUF012

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: activations.Name | None = "relu",
        activation_param: float | None = None,
        **options: Any,
    ) -> None:
        activations.check(activation, activation_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation
        self.activation_param = activation_param

    def extra_repr(self) -> str:
        param = "" if self.activation_param is None else f", activation_param={self.activation_param}"
        return f"{_NormBase.extra_repr(self)}, activation={self.activation}{param}, bn_ext"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_scripting():  # noqa: SIM102
            if isinstance(input, Proxy):
                return self._traced(input, residual=residual)
        return self._fused(input, residual, self.activation, self.activation_param)


class BatchNormAct1d(BatchNormAct):
    """Batch norm and an activation as one module, as :class:`torch.nn.Sequential` wants it.

    It is :class:`BatchNormAct2d` for other shapes, and no subclass of :class:`torch.nn.BatchNorm1d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.
        activation, activation_param: as for :class:`BatchNormAct2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).

    Raises:
        ValueError, RuntimeError, NotImplementedError: as :class:`BatchNormAct2d`.

    Example:
        >>> bn = bn_ext.BatchNormAct1d(8, activation="silu")
        >>> bn(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])
    """

    _check_input_dim = torch.nn.BatchNorm1d._check_input_dim


class BatchNormAct2d(BatchNormAct):
    """Batch norm and an activation as one module, as :class:`torch.nn.Sequential` wants it.

    ``module(input, residual=None)`` gives ``activation(batch_norm(input) + residual)`` in one pass. The names of
    parameters and buffers are those of :class:`torch.nn.BatchNorm2d`, but it is no subclass of it: whoever replaces,
    freezes or synchronizes torch's batch norms would drop the activation. Such tools leave this class alone, so
    :func:`torch.optim.swa_utils.update_bn` does not reset its statistics.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.
        activation: a name of :data:`bn_ext.activation.NAMES`, or None for none.
        activation_param: ``negative_slope`` of leaky_relu (0.01 unless given), ``alpha`` of elu and celu (1).

    Shape:
        - input, residual, output: (N, C, H, W), of any strides.

    Raises:
        ValueError: an unknown activation, or a parameter for one that has none.
        ValueError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.BatchNormAct2d(8, activation="silu")
        >>> bn(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
    """

    _check_input_dim = torch.nn.BatchNorm2d._check_input_dim


class BatchNormAct3d(BatchNormAct):
    """Batch norm and an activation as one module, as :class:`torch.nn.Sequential` wants it.

    It is :class:`BatchNormAct2d` for other shapes, and no subclass of :class:`torch.nn.BatchNorm3d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.
        activation, activation_param: as for :class:`BatchNormAct2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as :class:`BatchNormAct2d`.

    Example:
        >>> bn = bn_ext.BatchNormAct3d(8, activation="silu")
        >>> bn(torch.randn(4, 8, 2, 5, 5)).shape
        torch.Size([4, 8, 2, 5, 5])
    """

    _check_input_dim = torch.nn.BatchNorm3d._check_input_dim
