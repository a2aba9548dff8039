"""Batch norm with the channels in the last dimension."""

from __future__ import annotations

import math

from torch import Tensor
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing

from bn_ext import activation as activations
from bn_ext.functional import addition_error, as_tensor, check
from bn_ext.nn.base import FusedForward


def _expanded(residual: Tensor, input: Tensor) -> Tensor:
    try:
        return residual.expand_as(input)
    except RuntimeError as error:
        raise addition_error(residual, input, error) from None


class BatchNormLast(FusedForward):
    """Batch norm of inputs whose channels are the last dimension, such as (N, L, C), without a transposition.

    The call is that of :class:`BatchNorm2d`. Parameters and buffers have the names and sizes of
    :class:`torch.nn.BatchNorm1d`, whose ``state_dict`` it takes. It is no subclass of it, because torch's class would
    take the second dimension for the channels.

    Nothing is copied where the input is contiguous, or a transposed (N, C, L): the output is then laid out like it.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (..., C), of two dimensions or more; the residual also of sizes that broadcast to it.

    Raises:
        ValueError: in a call, an input of fewer than two dimensions, or what :class:`BatchNorm2d` refuses.
        TypeError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.BatchNormLast(8)
        >>> x = torch.randn(4, 50, 8)
        >>> torch.allclose(bn(x), bn_ext.BatchNorm1d(8)(x.mT).mT, atol=1e-6)
        True

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected 2D input or more, (..., C), got {input.dim()}D input")

    def _check_values(self, input: Tensor) -> None:
        """Raises the operator's error, which would name the sizes that the operator sees."""
        by_batch = (self.training and not self.frozen) or self.running_mean is None
        if by_batch and math.prod(input.shape[:-1]) == 1:
            size = f"torch.Size({list(input.shape)})"
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: activations.Name | None = None,
        activation_param: float | None = None,
    ) -> Tensor:
        if not is_scripting():
            if isinstance(input, Proxy):
                return self._traced(input, residual=residual, activation=activation, activation_param=activation_param)
            check(input, activation, activation_param)
            residual = as_tensor(residual, input)
        self._check_input_dim(input)
        if not is_scripting():
            if residual is not None and residual.dim() > 0:
                residual = _expanded(residual, input)
            if not (is_compiling() or is_tracing()):  # they would keep what a comparison of sizes gives
                self._check_values(input)
        transposed = not input.is_contiguous() and input.movedim(-1, 1).is_contiguous()
        if residual is not None and residual.dim() > 0:
            residual = residual.expand_as(input)
            residual = residual.movedim(-1, 1) if transposed else residual.flatten(0, -2)
        rows = input.movedim(-1, 1) if transposed else input.flatten(0, -2)
        output = self._fused(rows, residual, activation, activation_param)
        return output.movedim(1, -1) if transposed else output.view(input.size())
