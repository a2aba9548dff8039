"""The function behind the modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt, Tensor
from torch.compiler import is_exporting
from torch.jit import is_scripting, is_tracing

from bn_ext import _load  # noqa: F401, for the operator
from bn_ext import activation as activations
from bn_ext._fallback import fell_back

operator = torch.ops.bn_ext.batch_norm
FORWARD = "bn_ext::batch_norm_forward"
EXPORTED = "it is exported, for others to run"


def has_kernels(device: torch.device) -> bool:
    """Whether our operators compute on ``device``. Elsewhere torch's own operators do."""
    on_gpu = device.type == "cuda" and torch._C._dispatch_has_kernel_for_dispatch_key(FORWARD, "CUDA")
    return device.type == "cpu" or on_gpu


def exporting() -> bool:
    """Whether a graph is being exported: it should hold standard operators, because others run it."""
    return is_exporting() or (is_tracing() and torch.onnx.is_in_onnx_export())


def as_tensor(residual: Any, input: Tensor) -> Any:
    """The residual, as a tensor if it is a number: the operator takes tensors only."""
    is_number = isinstance(residual, (int, float, SymInt, SymFloat))
    return input.new_full((), residual) if is_number else residual  # type: ignore[arg-type]


def check(input: Any, activation: str | None, activation_param: float | None) -> None:
    """Raises errors before the dispatcher does, which prints the values of an argument that is no tensor."""
    if not hasattr(input, "__torch_function__"):
        raise TypeError(f"batch_norm(): argument 'input' must be Tensor, not {type(input).__name__}")
    if activation is not None or activation_param is not None:
        activations.check(activation, activation_param)


def finished(
    output: Tensor, residual: Tensor | None, activation: activations.Name | None, activation_param: float | None
) -> Tensor:
    """Adds the residual and applies the activation, by standard operators."""
    return activations.apply(output if residual is None else output + residual, activation, activation_param)


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
            separate calls, at their speed.
        activation: a name of :data:`bn_ext.activation.NAMES`, or None for none.
        activation_param: ``negative_slope`` of leaky_relu (0.01 unless given), ``alpha`` of elu (1).

    Shape:
        - input, residual: (N, C, *), any number of dimensions after the channels.
        - running_mean, running_var, weight, bias: (C,).
        - output: (N, C, *).

    Returns:
        The output, of the dtype of ``input`` and with the strides of torch's output.

    Raises:
        ValueError: in training, one value per channel, or ``eps`` not positive; one of the running statistics alone; an
            unknown activation, or a parameter for one that has none.
        RuntimeError: a size, dtype or device that does not fit the input; no statistics outside training.
        TypeError: an input or a momentum of None.
        NotImplementedError: an input that is not of a floating dtype.

    Example:
        >>> x, mean, var = torch.randn(4, 3, 5, 5), torch.zeros(3), torch.ones(3)
        >>> y = bn_ext.functional.batch_norm(x, mean, var, training=True, residual=x, activation="relu")
        >>> y.shape, y.min() >= 0
        (torch.Size([4, 3, 5, 5]), tensor(True))

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, Algorithm 1.
    """
    if not is_scripting():
        check(input, activation, activation_param)
        if momentum is None:  # to the operator it means a cumulative average
            raise TypeError("batch_norm(): momentum must be a number, got None")
        residual = as_tensor(residual, input)
        if exporting():
            fell_back(input, EXPORTED)
            output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
            return finished(output, residual, activation, activation_param)
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
    )
