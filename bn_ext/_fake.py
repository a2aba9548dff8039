"""What the operators return, without computing it: shapes, dtypes and strides for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_REDUCED = (torch.float16, torch.bfloat16)


def _check(condition: bool | torch.SymBool, message: str) -> None:
    torch._check(condition, lambda: f"batch_norm: {message}")


def _check_input(input: Tensor) -> None:
    torch._check_not_implemented(
        input.dtype in _FLOATING, lambda: f"\"batch_norm\" not implemented for '{input.dtype}'"
    )
    _check(input.dim() >= 2, f"input should have sizes (N, C, ...), got {tuple(input.shape)}")


def _check_per_channel(input: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None:
            _check(t.device == input.device, f"{name} is on {t.device} but input is on {input.device}")
            _check(t.numel() == input.size(1), f"{name} should contain {input.size(1)} elements not {t.numel()}")
            fits = t.dtype == input.dtype or (input.dtype in _REDUCED and t.dtype == torch.float32)
            _check(fits, f"{name} is of type {t.dtype} for an input of type {input.dtype}")


def _check_like(input: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None:
            _check(t.device == input.device, f"{name} is on {t.device} but input is on {input.device}")
            _check(t.dtype == input.dtype, f"{name} is of type {t.dtype} but input is of type {input.dtype}")
            _check(t.dim() == input.dim(), f"{name} has {t.dim()} dimensions but input has {input.dim()}")
            for size, expected in zip(t.shape, input.shape):
                _check(size == expected, f"expected {name} like the input, got {tuple(t.shape)}")


def _check_counter(input: Tensor, counter: Tensor | None) -> None:
    if counter is not None:
        fits = counter.device == input.device and counter.dtype == torch.int64
        what = f"num_batches_tracked should be of type {torch.int64} on {input.device}"
        _check(fits, f"{what}, got {counter.dtype} on {counter.device}")
        _check(counter.numel() == 1, f"num_batches_tracked should be one number, got {counter.numel()}")


def _empty_like(input: Tensor) -> Tensor:
    """An output for ``input``: channels last if they are and the rest is dense, else in the format torch picks."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if input.is_cuda:
        formats[3] = torch.preserve_format
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
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch._check_value(eps > 0, lambda: f"batch_norm eps must be positive during training, but got {eps}")
    _check_input(input)
    _check_counter(input, num_batches_tracked)
    return _forward(input, weight, bias, running_mean, running_var, residual, with_mask)


@torch.library.register_fake("bn_ext::batch_norm_forward.evaluation")
def _batch_norm_forward_evaluation(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    activation_param: float | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch._check_value(eps >= 0, lambda: f"batch_norm eps must be non-negative, but got {eps}")
    _check_input(input)
    return _forward(input, weight, bias, running_mean, running_var, residual, with_mask)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    with_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_per_channel(input, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _check_like(input, residual=residual)
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
    _check_input(input)
    _check_per_channel(input, weight=weight, bias=bias)
    _check_like(input, dy=dy, residual=residual)
    for name, t in {"mean": mean, "invstd": invstd}.items():
        fits = t.dtype == torch.float64 and t.device == input.device
        _check(fits, f"{name} should be of type {torch.float64} on {input.device}, got {t.dtype} on {t.device}")
        _check(t.numel() == input.size(1), f"{name} should hold {input.size(1)} values, got {t.numel()}")
    if mask is not None:
        fits = mask.dtype == torch.uint8 and mask.device == input.device
        _check(fits, f"mask should be of type {torch.uint8} on {input.device}, got {mask.dtype} on {mask.device}")
    accumulated = torch.float64 if input.dtype == torch.float64 else torch.float32
    dtype = accumulated if weight is None else weight.dtype
    wants_dx, *wants_parameters, wants_dresidual = output_mask
    dx, dresidual = (_empty_like(input) if wanted else None for wanted in (wants_dx, wants_dresidual))
    dweight, dbias = (input.new_empty(input.size(1), dtype=dtype) if wanted else None for wanted in wants_parameters)
    return dx, dweight, dbias, dresidual
