"""Fake kernels give shapes, dtypes and strides of results without data, for torch.compile and meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from bn_ext import activation as activations
from bn_ext._load import _C

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check(condition: bool | torch.SymBool, message: str) -> None:
    torch._check(condition, lambda: f"batch_norm: {message}")


def _check_input(input: Tensor, activation: int) -> None:
    known = input.dtype in FLOATING
    torch._check_not_implemented(known, lambda: f"\"batch_norm\" not implemented for '{input.dtype}'")
    _check(input.dim() >= 2, f"input should have sizes (N, C, ...), got {tuple(input.shape)}")
    known = 0 <= activation < len(activations.NAMES)
    torch._check_value(known, lambda: f"batch_norm: activation should be the number of an activation, got {activation}")


def _check_values(input: Tensor, name: str, t: Tensor | None, count: int, *dtypes: torch.dtype) -> None:
    """Checks that ``t``, if there is one, holds ``count`` values of one of these types on the input's device."""
    if t is not None:
        _check(t.device == input.device, f"{name} is on {t.device} but input is on {input.device}")
        _check(t.numel() == count, f"{name} should contain {count} elements not {t.numel()}")
        _check(t.dtype in dtypes, f"expected {name} of type {' or '.join(map(str, dtypes))}, got {t.dtype}")


def _check_per_channel(input: Tensor, **tensors: Tensor | None) -> None:
    reduced = input.dtype in (torch.float16, torch.bfloat16)
    for name, t in tensors.items():
        _check_values(input, name, t, input.size(1), input.dtype, *[torch.float32] * reduced)


def _check_like(input: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None:
            _check_values(input, name, t, input.numel(), input.dtype)
            alike = t.dim() == input.dim() and all(one == other for one, other in zip(t.shape, input.shape))
            _check(alike, f"expected {name} like the input, {tuple(input.shape)}, got {tuple(t.shape)}")


def _statistics(input: Tensor, set_size: int | None) -> Tensor:
    """A value of float64 for each channel, with ``set_size`` for each statistic set and channel."""
    _check_set_size(set_size)
    sets = [] if set_size is None else [(input.size(0) + set_size - 1) // set_size]
    return input.new_empty([*sets, input.size(1)], dtype=torch.float64)


def _check_set_size(set_size: int | None) -> None:
    torch._check_value(
        set_size is None or set_size > 0, lambda: f"batch_norm: set_size should be positive, got {set_size}"
    )


def _check_statistics(input: Tensor, set_size: int | None, **tensors: Tensor) -> None:
    values = _statistics(input, set_size).numel()
    for name, t in tensors.items():
        _check_values(input, name, t, values, torch.float64)
        _check(t.is_contiguous(), f"{name} should be contiguous")


def _check_branches(input: Tensor, branches: Tensor | None, activation: int) -> None:
    _check_values(input, "branches", branches, _branch_bytes(input), torch.uint8)
    _check(branches is None or branches.is_contiguous(), "branches should be contiguous")
    takes = branches is None or _C.keeps_branches(activations.NAMES[activation])
    _check(takes, f"{activations.NAMES[activation]} takes no branches")


def _branch_bytes(input: Tensor) -> int:
    return (input.numel() + 31) // 32 * 4


def _empty_like(input: Tensor) -> Tensor:
    """An output for ``input``: channels last if the input is that and dense, else in the format torch picks."""
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
    activation: int,
    activation_param: float,
    set_size: int | None,
    with_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_input(input, activation)
    torch._check_value(eps > 0, lambda: f"batch_norm eps must be positive during training, but got {eps}")
    several = input.numel() != input.size(1)
    torch._check_value(several, lambda: f"Expected more than 1 value per channel when training, got {input.shape}")
    _check_values(input, "num_batches_tracked", num_batches_tracked, 1, torch.int64)
    _check((running_mean is None) == (running_var is None), "running_mean and running_var: both or none")
    return _forward(input, weight, bias, running_mean, running_var, residual, activation, set_size, with_branches)


@torch.library.register_fake("bn_ext::batch_norm_forward.evaluation")
def _batch_norm_forward_evaluation(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    residual: Tensor | None,
    activation: int,
    activation_param: float,
    with_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_input(input, activation)
    given = running_mean is not None and running_var is not None
    _check(given, "running_mean and running_var must be defined in evaluation mode")
    torch._check_value(eps >= 0, lambda: f"batch_norm eps must be non-negative, but got {eps}")
    return _forward(input, weight, bias, running_mean, running_var, residual, activation, None, with_branches)


def _forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    activation: int,
    set_size: int | None,
    with_branches: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    _check_per_channel(input, running_mean=running_mean, running_var=running_var)
    output, branches = _applied(input, weight, bias, residual, activation, with_branches)
    return output, _statistics(input, set_size), _statistics(input, set_size), branches


def _applied(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    with_branches: bool,
) -> tuple[Tensor, Tensor | None]:
    if with_branches:
        _check(_C.keeps_branches(activations.NAMES[activation]), f"{activations.NAMES[activation]} has no branches")
    _check_per_channel(input, weight=weight, bias=bias)
    _check_like(input, residual=residual)
    return _empty_like(input), input.new_empty(_branch_bytes(input), dtype=torch.uint8) if with_branches else None


@torch.library.register_fake("bn_ext::batch_norm_backward")
def _batch_norm_backward(
    dy: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    training: bool,
    residual: Tensor | None,
    branches: Tensor | None,
    activation: int,
    activation_param: float,
    set_size: int | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    like = dy if input is None else input
    unneeded = (
        not training and not output_mask[1] and (activations.NAMES[activation] == "identity" or branches is not None)
    )
    _check(
        input is not None or unneeded,
        "input is needed in training, for the gradient of weight, and for z without branches",
    )
    _check_backward(dy, like, weight, bias, residual, branches, activation)
    _check_statistics(like, set_size, mean=mean, invstd=invstd)
    accumulated = torch.float64 if like.dtype == torch.float64 else torch.float32
    dtype = accumulated if weight is None else weight.dtype
    wants_dx, *wants_parameters, wants_dresidual = output_mask
    dx, dresidual = (_empty_like(like) if wanted else None for wanted in (wants_dx, wants_dresidual))
    dweight, dbias = (like.new_empty(like.size(1), dtype=dtype) if wanted else None for wanted in wants_parameters)
    return dx, dweight, dbias, dresidual


@torch.library.register_fake("bn_ext::batch_norm_stats")
def _batch_norm_stats(input: Tensor, set_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    _check_input(input, 0)
    mean = _statistics(input, set_size)
    return mean.new_empty(mean.shape[:-1]), mean, torch.empty_like(mean)


@torch.library.register_fake("bn_ext::batch_norm_merge_stats")
def _batch_norm_merge_stats(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(mean.dim() in (1, 2), f"mean should have sizes (rows, C) or (C,), got {tuple(mean.shape)}")
    channels = mean.size(-1)
    rows = mean.size(0) if mean.dim() == 2 else 1
    for name, t, values in (("count", count, rows), ("mean", mean, mean.numel()), ("m2", m2, mean.numel())):
        _check_values(mean, name, t, values, torch.float64)
        _check(t.is_contiguous(), f"{name} should be contiguous")
    for name, running in {"running_mean": running_mean, "running_var": running_var}.items():
        _check_values(mean, name, running, channels, *FLOATING)
    _check_values(mean, "num_batches_tracked", num_batches_tracked, 1, torch.int64)
    return count.new_empty(()), mean.new_empty(channels), mean.new_empty(channels)


@torch.library.register_fake("bn_ext::batch_norm_elemt")
def _batch_norm_elemt(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    activation: int,
    activation_param: float,
    set_size: int | None,
    with_branches: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_input(input, activation)
    _check_statistics(input, set_size, mean=mean, invstd=invstd)
    return _applied(input, weight, bias, residual, activation, with_branches)


def _check_backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    branches: Tensor | None,
    activation: int,
) -> None:
    _check_input(input, activation)
    _check_per_channel(input, weight=weight, bias=bias)
    _check_like(input, dy=dy, residual=residual)
    _check_branches(input, branches, activation)


@torch.library.register_fake("bn_ext::batch_norm_backward_reduce")
def _batch_norm_backward_reduce(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    residual: Tensor | None,
    branches: Tensor | None,
    activation: int,
    activation_param: float,
    set_size: int | None,
) -> tuple[Tensor, Tensor]:
    _check_backward(dy, input, weight, bias, residual, branches, activation)
    _check_statistics(input, set_size, mean=mean, invstd=invstd)
    return _statistics(input, set_size), _statistics(input, set_size)


@torch.library.register_fake("bn_ext::batch_norm_backward_elemt")
def _batch_norm_backward_elemt(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xmu: Tensor,
    count: Tensor,
    residual: Tensor | None,
    branches: Tensor | None,
    activation: int,
    activation_param: float,
    set_size: int | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    _check_backward(dy, input, weight, bias, residual, branches, activation)
    _check_statistics(input, set_size, mean=mean, invstd=invstd, sum_dz=sum_dz, sum_dz_xmu=sum_dz_xmu)
    _check_values(input, "count", count, _statistics(input, set_size)[..., :1].numel(), torch.float64)
    dx, dresidual = (_empty_like(input) if wanted else None for wanted in output_mask)
    return dx, dresidual
