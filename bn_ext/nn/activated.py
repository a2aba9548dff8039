"""The batch norms with an activation: each pair is one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.jit import is_scripting
from torch.nn.modules.batchnorm import _NormBase

from bn_ext import activation as activations
from bn_ext.nn.base import FusedForward


class BatchNormAct(FusedForward):
    """The base of the three classes of batch norm with an activation."""

    __constants__ = [*FusedForward.__constants__, "activation", "activation_param"]  # noqa: RUF012

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
        return f"{_NormBase.extra_repr(self)}, activation={self.activation}{param}, bn_ext{self._changed()}"

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
