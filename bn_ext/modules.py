"""The modules: torch's own in everything but the forward call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.jit import is_scripting

from bn_ext.functional import exporting, operator


class _FusedForward(torch.nn.modules.batchnorm._BatchNorm):
    """Statistics, normalization, running statistics and the batch counter in one operator call."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_scripting():
            if isinstance(input, Proxy):  # fx makes leaves of torch.nn's modules only
                return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), (input,), {})
            if exporting():
                return super().forward(input)
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
        )


class BatchNorm1d(_FusedForward, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels: (N, C) or (N, C, L)."""


class BatchNorm2d(_FusedForward, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels: (N, C, H, W), contiguous or channels-last."""


class BatchNorm3d(_FusedForward, torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` on fused kernels: (N, C, D, H, W), contiguous or channels-last."""
