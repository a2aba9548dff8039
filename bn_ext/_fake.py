"""What the operators return, without computing it: shapes, dtypes and strides for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def _empty_like(input: Tensor) -> Tensor:
    """An output for ``input``: channels last if they are and the rest is dense, else in the format torch picks."""
    formats = {3: torch.preserve_format, 4: torch.channels_last, 5: torch.channels_last_3d}
    if input.dim() in formats and not input.is_contiguous() and input.movedim(1, -1).is_contiguous():
        return torch.empty_like(input, memory_format=formats[input.dim()])
    return torch.empty_like(input, memory_format=torch._prims_common.suggest_memory_format(input))


@torch.library.register_fake("bn_ext::batch_norm_forward")
def _batch_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mean = input.new_empty(input.size(1), dtype=torch.float64)
    mask = input.new_empty((input.numel() + 31) // 32 * 4, dtype=torch.uint8) if with_mask else None
    return _empty_like(input), mean, torch.empty_like(mean), mask


@torch.library.register_fake("bn_ext::batch_norm_backward")
def _batch_norm_backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    accumulated = torch.float64 if input.dtype == torch.float64 else torch.float32
    dtype = accumulated if weight is None else weight.dtype
    wants_dx, *wants_parameters, wants_dresidual = output_mask
    dx, dresidual = (_empty_like(input) if wanted else None for wanted in (wants_dx, wants_dresidual))
    dweight, dbias = (input.new_empty(input.size(1), dtype=dtype) if wanted else None for wanted in wants_parameters)
    return dx, dweight, dbias, dresidual
