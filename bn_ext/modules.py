"""The modules: torch's own in everything but the forward call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.jit import is_scripting

from bn_ext import activation as activations
from bn_ext.functional import as_tensor, exporting, finished, operator


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """Statistics, normalization, residual, activation, running statistics and batch counter in one operator call."""

    __constants__ = [*torch.nn.modules.batchnorm._BatchNorm.__constants__, "activation", "activation_param"]  # noqa: RUF012

    # Of a module that has none, it is no attribute of its own.
    activation = cast("str | None", None)
    activation_param = cast("float | None", None)

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
        activation: str | None = None,
        activation_param: float | None = None,
        **options: Any,
    ) -> None:
        activations.check(activation, activation_param)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        if activation is not None:
            self.activation = activation
        if activation_param is not None:
            self.activation_param = activation_param

    def extra_repr(self) -> str:
        of_activation = "" if self.activation is None else f", activation={self.activation}"
        of_param = "" if self.activation_param is None else f", activation_param={self.activation_param}"
        return super().extra_repr() + of_activation + of_param

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_scripting():
            if isinstance(input, Proxy):  # fx makes leaves of torch.nn's modules only
                inputs = (input,) if residual is None else (input, residual)
                return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), inputs, {})
            residual = as_tensor(residual, input)
            if exporting():
                return finished(super().forward(input), residual, self.activation, self.activation_param)
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
            self.activation,
            self.activation_param,
        )


class BatchNorm1d(_FusedForward, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_FusedForward, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels: (N, C, H, W), contiguous or channels-last.

    ``activation`` and ``activation_param`` are those of :func:`bn_ext.functional.batch_norm`; called as
    ``module(input, residual)`` it gives ``activation(batch_norm(input) + residual)``.
    """


class BatchNorm3d(_FusedForward, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on fused kernels: (N, C, D, H, W), contiguous or channels-last."""
