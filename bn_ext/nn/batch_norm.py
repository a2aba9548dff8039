"""The batch norms: torch's own in everything but the forward call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.jit import is_scripting

from bn_ext import activation as activations
from bn_ext.functional import mask_of
from bn_ext.nn.base import FusedForward


class _FusedBatchNorm(FusedForward):
    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: activations.Name | None = None,
        activation_param: float | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if not is_scripting():  # noqa: SIM102, which would have TorchScript compile what is inside
            if isinstance(input, Proxy):
                return self._traced(
                    input,
                    residual=residual,
                    activation=activation,
                    activation_param=activation_param,
                    mask=mask,
                    lengths=lengths,
                )
        return self._fused(input, residual, activation, activation_param, mask_of(input, mask, lengths))


class BatchNorm1d(_FusedBatchNorm, torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` on fused kernels, and what follows the normalization in the same pass.

    The call takes a residual, an activation and a mask, as :class:`BatchNorm2d` does. For inputs (N, C, L) it takes
    ``lengths`` instead of a mask: of image n the first ``lengths[n]`` positions count.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).
        - mask: (N,) or (N, L).
        - lengths: (N,).

    Raises:
        TypeError: in a call, ``lengths`` of another type than integers.
        TypeError, ValueError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.BatchNorm1d(8)
        >>> x, residual = torch.randn(2, 4, 8, 5)
        >>> bn(x, residual, activation="relu").shape
        torch.Size([4, 8, 5])
    """


class BatchNorm2d(_FusedBatchNorm, torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` on fused kernels, and what follows the normalization in the same pass.

    ``module(input, residual, activation="relu", activation_param=None, mask=None)`` gives
    ``activation(batch_norm(input) + residual)``, and 0 where the mask is False; each of the four is optional, as in
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
        - mask: (N, H, W).

    Raises:
        TypeError: in a call, an input, a residual or a mask that is no tensor.
        ValueError: in a call, an input of another rank; in training, one value per channel, or ``eps`` not positive; an
            unknown activation, or a parameter for one that has none; a mask of other sizes.
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

    The call takes a residual, an activation and a mask, as :class:`BatchNorm2d` does.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as for :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.
        - mask: (N, D, H, W).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.BatchNorm3d(8)
        >>> x, residual = torch.randn(2, 4, 8, 2, 5, 5)
        >>> bn(x, residual, activation="relu").shape
        torch.Size([4, 8, 2, 5, 5])
    """
