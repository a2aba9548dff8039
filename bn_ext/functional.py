"""The function behind the modules, and how its calls are cut into work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt, Tensor
from torch.compiler import is_exporting
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing

from bn_ext import activation as activations
from bn_ext._fallback import fell_back
from bn_ext._load import _C

if TYPE_CHECKING:
    from bn_ext._C import CpuPlan, LaunchPlan

operator = torch.ops.bn_ext.batch_norm
FORWARD = "bn_ext::batch_norm_forward"
EXPORTED = "it is exported, for others to run"


def has_kernels(device: torch.device) -> bool:
    """Whether our operators compute on ``device``. Elsewhere torch's own operators do."""
    on_gpu = device.type == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, "CUDA")
    return device.type == "cpu" or on_gpu


def not_exportable(what: str, instead: str) -> RuntimeError:
    """The error for a call that standard operators, which an exported graph holds, would answer otherwise."""
    return RuntimeError(f"{what} is not exported in training: {instead}")


def exporting() -> bool:
    """Whether a graph is being exported: it should hold standard operators, because others run it."""
    return is_exporting() or (is_tracing() and torch.onnx.is_in_onnx_export())


def as_tensor(residual: Any, input: Tensor) -> Any:
    """The residual, as a tensor if it is a number: the operator takes tensors only."""
    if isinstance(residual, (int, float, SymInt, SymFloat)):
        return input.new_full((), residual)  # type: ignore[arg-type]
    if residual is not None:
        check_tensor("residual", residual)
    return residual


def check_tensor(name: str, value: Any) -> None:
    """Raises an error before the dispatcher does, which prints the values of an argument that is no tensor."""
    if not hasattr(value, "__torch_function__"):
        raise TypeError(f"batch_norm(): argument '{name}' must be Tensor, not {type(value).__name__}")


def addition_error(residual: Tensor, input: Tensor, error: RuntimeError) -> RuntimeError:
    """The error of a residual that cannot be added, because torch raises ``error`` for its sizes."""
    sizes = f"residual of sizes {list(residual.shape)} for an input of sizes {list(input.shape)}"
    return RuntimeError(f"batch_norm: {sizes}: {error}")


def check(input: Any, activation: str | None, activation_param: float | None) -> None:
    """Raises the errors that the operator does not raise, or not as clearly."""
    check_tensor("input", input)
    if not isinstance(input, Proxy) and getattr(input, "is_nested", False):
        raise NotImplementedError("batch_norm(): nested tensors have no batch norm: pad them, and give a mask")
    if activation is not None or activation_param is not None:
        activations.check(activation, activation_param)


def check_virtual_batch_size(size: Any) -> None:
    """Raises the errors of a number of images in a virtual batch."""
    if isinstance(size, bool) or not isinstance(size, (int, SymInt)):
        raise TypeError(f"virtual_batch_size should be an int, got {type(size).__name__}")
    if not 1 <= size < 2**63:  # what the operator takes
        raise ValueError(f"virtual_batch_size should be positive and less than 2**63, got {size}")


def mask_of(input: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The mask of a call that may be given the lengths of sequences instead."""
    if mask is None and lengths is None:
        return None
    if not is_scripting():
        check(input, None, None)
        check_tensor("mask" if lengths is None else "lengths", mask if lengths is None else lengths)
    if lengths is None:
        return mask
    if mask is not None:
        raise ValueError("batch_norm(): mask and lengths were both given")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths should be of an integer type, got {lengths.dtype}")
    # A trace would keep the result of a comparison of sizes, and warn.
    if input.dim() != 3 or lengths.dim() != 1 or (not is_tracing() and lengths.size(0) != input.size(0)):
        raise ValueError(f"lengths of sizes {lengths.size()} are for inputs (N, C, L), got sizes {input.size()}")
    if lengths.device != input.device:
        raise RuntimeError(f"lengths is on {lengths.device} but input is on {input.device}")
    return torch.arange(input.size(2), device=input.device) < lengths.to(torch.int64).unsqueeze(1)


def masked(output: Tensor, mask: Tensor | None) -> Tensor:
    """The output, and 0 where the mask is not positive, by standard operators."""
    if mask is None:
        return output
    return torch.where(mask.unsqueeze(1) > 0, output, torch.zeros((), dtype=output.dtype, device=output.device))


def finished(
    output: Tensor,
    residual: Tensor | None,
    activation: activations.Name | None,
    activation_param: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Adds the residual and applies the activation, by standard operators. Behind the mask neither sees anything."""
    z = output if residual is None else masked(output + residual, mask)
    return masked(activations.apply(z, activation, activation_param), mask)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: activations.Name | None = None,
    activation_param: float | None = None,
    *,
    virtual_batch_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batch normalization, as :func:`torch.nn.functional.batch_norm`: each channel to mean 0 and variance 1, then
    ``* weight + bias``; then ``+ residual`` and the activation, in the same pass.

    Args:
        input: of float64, float32, bfloat16 or float16, of any strides.
        running_mean, running_var: of the input's dtype or, for a half-precision input, float32. In training
            they are updated in place (the variance with the unbiased estimate), unless None; otherwise they are the
            statistics to normalize by, and required.
        weight, bias: dtypes as above, or None for 1 and 0.
        training: normalize by the statistics of this batch, the variance biased.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        residual: of the input's shape and dtype. A number or another tensor that can be added gives the same as
            separate calls, at their speed and in their memory: an activation behind it keeps a tensor of the input's
            size for the backward, in evaluation too.
        activation: a name of :data:`bn_ext.activation.NAMES`, or None for none.
        activation_param: ``negative_slope`` of leaky_relu (0.01 unless given), ``alpha`` of elu and celu (1).
        virtual_batch_size: in training, each run of so many images is normalized by statistics of its own, as
            :class:`bn_ext.nn.GhostBatchNorm2d` does it. Not read otherwise.
        mask: how much each value counts in the statistics: bool, or numbers. Where it is False or not positive the
            input and the residual may be anything, and the output and their gradients are 0. With at most one value
            that counts, in each virtual batch, nothing is written. It has no gradient.

    Shape:
        - input, residual: (N, C, *), any number of dimensions after the channels.
        - running_mean, running_var, weight, bias: (C,).
        - mask: (N, *).
        - output: (N, C, *).

    Returns:
        The output, of the dtype of ``input`` and with the strides of torch's output.

    Raises:
        ValueError: in training, one value per channel, or ``eps`` not positive; one of the running statistics alone; an
            unknown activation, or a parameter that it does not take; a ``virtual_batch_size`` below 1 or of 2**63 and
            more; a mask of other sizes.
        RuntimeError: a size, dtype or device that does not fit the input; no statistics outside training; an export of
            virtual batches, or of a mask in training; a mask that requires gradients.
        TypeError: an input, a residual or a mask that is no tensor; a ``virtual_batch_size`` that is no int; a momentum
            of None.
        NotImplementedError: an input that is not of a floating dtype.

    Example:
        >>> x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
        >>> y = bn_ext.functional.batch_norm(x, mean, var, training=True, residual=x, activation="relu")
        >>> y.shape, y.min() >= 0
        (torch.Size([4, 3, 5, 5]), tensor(True))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1.
    """
    return _batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
        activation_param,
        virtual_batch_size,
        mask,
    )


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: activations.Name | None = None,
    activation_param: float | None = None,
    virtual_batch_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    if not is_scripting():
        check(input, activation, activation_param)
        if momentum is None:  # to the operator it means a cumulative average
            raise TypeError("batch_norm(): momentum must be a number, got None")
        if virtual_batch_size is not None:
            check_virtual_batch_size(virtual_batch_size)
        if mask is not None:
            check_tensor("mask", mask)
        residual = as_tensor(residual, input)
        if exporting():
            if training and virtual_batch_size is not None:
                raise not_exportable("batch_norm() with a virtual_batch_size", "export with training=False")
            if training and mask is not None:
                raise not_exportable("batch_norm() with a mask", "export with training=False")
            fell_back(input, EXPORTED)
            output = F.batch_norm(masked(input, mask), running_mean, running_var, weight, bias, training, momentum, eps)
            return finished(output, residual, activation, activation_param, mask)
    return operator(
        input,
        weight,
        bias,
        running_mean,
        running_var,
        None,
        training,
        momentum,
        eps,
        residual,
        activation,
        activation_param,
        virtual_batch_size,
        mask,
    )


# TorchScript has no arguments that are given by name alone.
batch_norm.__prepare_scriptable__ = lambda: _batch_norm  # type: ignore[attr-defined]


def plan(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    direction: Literal["forward", "inference", "backward"] = "forward",
    *,
    activation: activations.Name | None = None,
    residual: bool = False,
    set_size: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    last_cache_bytes: int | None = None,
) -> CpuPlan | LaunchPlan:
    """How a call is cut into work, on the CPU or on a GPU. Nothing runs, and no GPU is needed.

    Args:
        shape: of the input, (N, C, *).
        dtype: of the input.
        memory_format: ``torch.contiguous_format``, ``torch.channels_last`` (four dimensions) or
            ``torch.channels_last_3d`` (five).
        direction: ``"forward"`` is training, ``"backward"`` its gradients, all of them.
        activation: a name of :data:`bn_ext.activation.NAMES`, or None for none.
        residual: whether one is added.
        set_size: images of a statistic set, each of which is normalized by itself; the last set may have fewer. None:
            all images are one set, as in inference they always are.
        device: ``"cpu"``, or the name of a GPU: ``"t4"``, ``"a100"``, ``"rtx4090"``, ``"h100"``, ``"b200"``,
            ``"rtx5090"``.
        threads: of the CPU; ``torch.get_num_threads()`` unless given.
        last_cache_bytes: of the CPU; the size of this machine's last cache unless given.

    Returns:
        A value: plans can be compared, and print every field. ``csrc/cpu/plan.h`` and ``csrc/cuda/plan.h`` say what
        the fields mean.

    Raises:
        ValueError: a name, dtype, memory format or number that is none of these, or an input that no memory holds.
        TypeError: a dtype or a memory format of another type, or a size beyond 63 bits.

    Example:
        >>> bn_ext.plan((32, 64, 56, 56), device="h100").bytes_moved == 2 * 4 * 32 * 64 * 56 * 56
        True
        >>> one, two = (bn_ext.plan((32, 64, 56, 56), threads=threads) for threads in (1, 2))
        >>> one == two, one.chunks == two.chunks  # how sums are cut does not depend on threads
        (False, True)
    """
    for name, value, type_ in (("dtype", dtype, torch.dtype), ("memory_format", memory_format, torch.memory_format)):
        if not isinstance(value, type_):
            raise TypeError(f"{name} should be a torch.{type_.__name__}, got {type(value).__name__}")
    if len(shape) < 2:
        raise ValueError(f"shape should be (N, C, *), got {tuple(shape)}")
    dimensions = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    if dimensions.get(memory_format) != len(shape):
        raise ValueError(f"memory_format {memory_format} does not fit a shape of {len(shape)} dimensions")
    n, c, *rest = shape
    if not isinstance(set_size, (int, type(None))):
        raise TypeError(f"set_size should be an int or None, got {type(set_size).__name__}")
    call = _C.Pass(
        (n, c, math.prod(rest)),
        dtype=str(dtype).removeprefix("torch."),
        layout="planar" if memory_format == torch.contiguous_format else "interleaved",
        direction=direction,
        activation=activation or "identity",
        residual=residual,
        set_size=set_size,
    )
    if device == "cpu":
        threads = torch.get_num_threads() if threads is None else threads
        last_cache_bytes = _C.last_cache_bytes() if last_cache_bytes is None else last_cache_bytes
        return _C.cpu_plan(call, threads=threads, last_cache_bytes=last_cache_bytes)
    if threads is not None or last_cache_bytes is not None:
        raise ValueError(f"threads and last_cache_bytes are for device='cpu', got device={device!r}")
    return _C.launch_plan(call, gpu=device, margin=_C.sm_margin())
