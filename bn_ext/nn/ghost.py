"""Batch norm by virtual batches: statistics of parts of one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from bn_ext.functional import check_virtual_batch_size, not_exportable
from bn_ext.nn.batch_norm import _FusedBatchNorm


class GhostBatchNorm(_FusedBatchNorm):
    """The base of the three classes of ghost batch norm."""

    __constants__ = [*_FusedBatchNorm.__constants__, "virtual_batch_size", "noise"]  # noqa: RUF012

    def __init__(self, num_features: int, virtual_batch_size: int = 32, noise: bool = False, **options: Any) -> None:
        check_virtual_batch_size(virtual_batch_size)
        if type(noise) is not bool:
            raise TypeError(f"noise should be a bool, got {type(noise).__name__}: give other options by name")
        super().__init__(num_features, **options)
        self.virtual_batch_size = virtual_batch_size
        self.noise = noise

    def extra_repr(self) -> str:
        own = f"virtual_batch_size={self.virtual_batch_size}, noise={self.noise}"
        return f"{_NormBase.extra_repr(self)}, {own}, bn_ext{self._changed()}"

    def _check_exportable(self) -> None:
        if self.training and not self.frozen:
            raise not_exportable(type(self).__name__, "call eval() first, where it is torch's batch norm")

    def _for_training(self, input: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None, int | None]:
        weight, bias = self.weight, self.bias
        if not self.noise:
            return weight, bias, self.virtual_batch_size
        if input.dim() < 2 or input.size(0) <= self.virtual_batch_size:
            return weight, bias, None
        if mask is not None:  # checked before anything is drawn
            mask = torch.ops.bn_ext.batch_norm_mask(input, mask)
        # (x_hat - n1) * exp(-n2) * weight + bias, as a weight and a bias; n1 has variance 1/m, n2 1/(2m).
        channels = input.size(1)
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        noise = torch.randn([2, channels], dtype=dtype, device=input.device)
        inverse_m = 1.0 / self.virtual_batch_size - 1.0 / input.size(0)  # of images of one value
        if mask is None:
            noise = noise * (inverse_m * max(channels, 1) * input.size(0) / max(input.numel(), 1)) ** 0.5
        else:
            weights = mask.double()
            weights = weights / weights.sum().clamp(min=1e-300)
            values = 1 / weights.square().sum()  # as many that count alike have a mean of this variance
            variance = torch.where(values > 1, inverse_m * input.size(0) / values, torch.zeros_like(values))
            noise = noise * variance.sqrt().to(dtype)
        scale = torch.exp(-noise[1] * 0.5**0.5)
        if weight is not None:
            scale = scale * weight
        shift = -noise[0] * scale
        if bias is not None:
            shift = shift + bias
        return scale, shift, None


class GhostBatchNorm1d(GhostBatchNorm, torch.nn.BatchNorm1d):
    """Batch norm that normalizes by the statistics of virtual batches, parts of one batch.

    It is :class:`GhostBatchNorm2d` for other shapes.

    Args:
        num_features, virtual_batch_size, noise, **options: as for :class:`GhostBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C) or (N, C, L).

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :class:`GhostBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.GhostBatchNorm1d(8, virtual_batch_size=4)
        >>> x = torch.randn(12, 8)
        >>> torch.allclose(bn(x)[:4], bn_ext.BatchNorm1d(8)(x[:4]))
        True
    """


class GhostBatchNorm2d(GhostBatchNorm, torch.nn.BatchNorm2d):
    """Batch norm that normalizes by the statistics of virtual batches, parts of one batch.

    In training each run of ``virtual_batch_size`` images, the last of which may be shorter, has a mean and a variance
    of its own, in one launch for all of them. Large batches then have the noise of small ones, by which batch norm
    regularizes. Running statistics move once a batch: towards the mean of all values, and the variance within virtual
    batches, unbiased. In evaluation it computes what :class:`torch.nn.BatchNorm2d` does, of which it is a subclass, and
    its ``state_dict`` is that of it. The call is that of :class:`BatchNorm2d`.

    Args:
        num_features: C, the number of channels.
        virtual_batch_size: images of a virtual batch.
        noise: normalize by the statistics of the whole batch instead, to which noise is added that varies as those of
            virtual batches do: mean + std · N(0, 1/m) and std · exp(N(0, 1/(2m))), without gradient, where 1/m is one
            over the values of a virtual batch less one over those of the batch. Values are taken to be independent.
        options: by name: ``eps``, ``momentum``, ``affine``, ``track_running_stats``, ``device`` and ``dtype``, as for
            :class:`BatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, H, W), of any strides.

    Raises:
        TypeError: a ``virtual_batch_size`` that is no int, or a ``noise`` that is no bool; in a call, as
            :class:`BatchNorm2d`.
        ValueError: a ``virtual_batch_size`` below 1 or of 2**63 and more; in a call, virtual batches of one value per
            channel (but for a last, shorter one), or what :class:`BatchNorm2d` refuses.
        RuntimeError: in training, :func:`torch.export.export` or ONNX; in a call, as :class:`BatchNorm2d`.
        NotImplementedError: in a call, as :class:`BatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.GhostBatchNorm2d(8, virtual_batch_size=16)
        >>> x = torch.randn(40, 8, 5, 5)
        >>> torch.allclose(bn(x)[32:], bn_ext.BatchNorm2d(8)(x[32:]), atol=1e-6)
        True

    Source: Hoffer, Hubara & Soudry 2017, arXiv 1705.08741.
    """


class GhostBatchNorm3d(GhostBatchNorm, torch.nn.BatchNorm3d):
    """Batch norm that normalizes by the statistics of virtual batches, parts of one batch.

    It is :class:`GhostBatchNorm2d` for other shapes.

    Args:
        num_features, virtual_batch_size, noise, **options: as for :class:`GhostBatchNorm2d`.

    Shape:
        - input, residual, output: (N, C, D, H, W), of any strides.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :class:`GhostBatchNorm2d`.

    Example:
        >>> bn = bn_ext.nn.GhostBatchNorm3d(8, virtual_batch_size=4, noise=True)
        >>> bn(torch.randn(12, 8, 2, 5, 5)).shape
        torch.Size([12, 8, 2, 5, 5])
    """
