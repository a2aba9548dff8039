"""The cases the kernels are tested on (shapes, memory layouts, number types, modes) and how to run one.

A case is run three times: by bn_ext, by torch, and by the float64 formulas of `bn_ext.reference`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import bn_ext
from bn_ext import reference


def _missing_on_gpu() -> str | None:
    """Says what keeps the tests from a GPU."""
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("bn_ext::batch_norm_forward", "CUDA"):
        return "bn_ext was built without GPU kernels"
    return None


NO_GPU = _missing_on_gpu()
DEVICES = ["cpu", *([] if NO_GPU else [pytest.param("cuda", marks=pytest.mark.gpu)])]

# ---------------------------------------------------------------------------------------------- number types


class Types(NamedTuple):
    """Number types of the input, of weight and bias, and of the running statistics."""

    input: torch.dtype
    param: torch.dtype
    stat: torch.dtype

    def __str__(self) -> str:
        short = {torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
        return "-".join(short[t] for t in self)


def _halves(half: torch.dtype) -> list[Types]:
    single = torch.float32
    return [Types(half, half, half), Types(half, single, single), Types(half, half, single)]


FLOAT, DOUBLE = Types(*[torch.float32] * 3), Types(*[torch.float64] * 3)
BFLOAT = Types(torch.bfloat16, torch.float32, torch.float32)
TYPES = [FLOAT, DOUBLE, *_halves(torch.bfloat16), *_halves(torch.float16)]

# ---------------------------------------------------------------------------------------------- memory layouts
# Each takes a contiguous tensor and returns the same values laid out otherwise; what lies between them is NaN.


def _part_of(shape: tuple[int, ...], part: tuple, x: Tensor) -> Tensor:
    view = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)[part]
    return view.copy_(x)


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def unaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    return _part_of((x.numel() + 32,), (slice(1, x.numel() + 1),), x.reshape(-1)).view(x.shape)


def strided(x: Tensor) -> Tensor:
    """Every second element of the last dimension."""
    return _part_of((*x.shape[:-1], 2 * x.size(-1)), (..., slice(None, None, 2)), x)


def channel_slice(x: Tensor) -> Tensor:
    """Some of the channels of a wider channels-last tensor."""
    rows = x.movedim(1, -1)
    return _part_of((*rows.shape[:-1], x.size(1) + 5), (..., slice(2, -3)), rows).movedim(-1, 1)


def expanded(x: Tensor) -> Tensor:
    """One sample for the whole batch (the only layout that changes the values)."""
    return x[:1].expand(x.shape)


LAYOUTS = [contiguous, channels_last, transposed, unaligned, strided, channel_slice, expanded]


def same_format(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike (the strides of size-1 dimensions say nothing)."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


# ---------------------------------------------------------------------------------------------- shapes

# Around the widths of vectors and blocks: S = 1, 7, 49; odd channel counts; 32 rows; 1024 elements a channel.
SMALL = [
    (2, 1),
    (5, 3),
    (31, 35),
    (33, 65),
    (64, 16),
    (4, 3, 1),
    (2, 35, 7),
    (3, 65, 49),
    (1, 3, 1023),
    (2, 2, 1025),
    (33, 5, 31),
    (3, 1, 7, 7),
    (8, 64, 1, 1),
    (2, 35, 5, 3),
    (2, 16, 33, 32),
    (2, 3, 3, 5, 2),
    (3, 65, 2, 1, 4),
]
# Several chunks of work a channel.
LARGE = [(5003, 7), (300, 130), (4, 2, 70001), (2, 3, 150, 150), (16, 33, 14, 14), (2, 5, 20, 31, 33)]


# Inputs are multiples of it, so that in float64 a constant of the mean's size comes off without rounding.
GRAIN = 2.0**-20


class Mode(NamedTuple):
    training: bool
    running: bool  # are there running statistics

    def __str__(self) -> str:
        return ("training" if self.training else "evaluation") + ("" if self.running else ", no running statistics")


MODES = [Mode(True, True), Mode(True, False), Mode(False, True)]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = contiguous
    types: Types = FLOAT
    mode: Mode = MODES[0]
    weight: bool = True
    bias: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    offset: float = 2.0  # the largest ratio of a channel's mean to its deviation
    dy_layout: Callable[[Tensor], Tensor] | None = None  # the input's unless given
    residual: bool = False
    residual_layout: Callable[[Tensor], Tensor] | None = None  # the input's unless given
    activation: str | None = None
    activation_param: float | None = None

    def __str__(self) -> str:
        fused = "-residual" * self.residual + ("" if self.activation is None else f"-{self.activation}")
        evaluation = "-evaluation" * (not self.mode.training)
        return f"{'x'.join(map(str, self.shape))}-{self.layout.__name__}-{self.types}{fused}{evaluation}"

    def arguments(self, device: str) -> Arguments:
        """Random tensors of this case: channels of differing mean and deviation."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=torch.float64)

        channels = self.shape[1]
        per_channel = (1, channels, *[1] * (len(self.shape) - 2))
        deviation = torch.rand(channels, device=device, dtype=torch.float64) + 0.5
        sign = 1 - 2 * (torch.arange(channels, device=device) % 2)
        mean = deviation * self.offset * sign * (torch.rand(channels, device=device, dtype=torch.float64) + 1) / 2
        input = normal(*self.shape) * deviation.view(per_channel) + mean.view(per_channel)
        input = (input / GRAIN).round() * GRAIN
        running = self.mode.running
        made = Arguments(
            input=self.layout(input.to(self.types.input)),
            running_mean=(mean + normal(channels) / 4).to(self.types.stat) if running else None,
            running_var=(deviation.square() + 0.1).to(self.types.stat) if running else None,
            weight=normal(channels).to(self.types.param) if self.weight else None,
            bias=normal(channels).to(self.types.param) if self.bias else None,
            training=self.mode.training,
            momentum=self.momentum,
            eps=self.eps,
            dy=(self.dy_layout or self.layout)((normal(*self.shape) + 0.25).to(self.types.input)),
            residual=(self.residual_layout or self.layout)((2 * normal(*self.shape)).to(self.types.input))
            if self.residual
            else None,
            activation=self.activation,
            activation_param=self.activation_param,
        )
        if self.activation is not None and self.layout is not expanded:
            made.dy[near_kinks(made)] = 0
        return made


def _grid(shapes: list[tuple[int, ...]], layouts: list[Callable], every_types: list[Types]) -> list[Case]:
    grid = [Case(*point) for point in itertools.product(shapes, layouts, every_types)]
    return [p for p in grid if p.layout is not channels_last or len(p.shape) > 2]  # two dimensions are that anyhow


# The kernels know two layouts; the others are copied or read in place the same way for every number type.
SMALL_GRID = _grid(SMALL, LAYOUTS[:2], TYPES) + _grid(SMALL, LAYOUTS[2:], [FLOAT, BFLOAT])
LARGE_GRID = _grid(LARGE, LAYOUTS[:2], [FLOAT, DOUBLE, BFLOAT])

# ---------------------------------------------------------------------------------------------- running one


@dataclass
class Arguments:
    """The arguments of one call of batch_norm, and the gradient of its output."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    dy: Tensor
    residual: Tensor | None = None
    activation: str | None = None
    activation_param: float | None = None

    @property
    def param(self) -> float:
        default = bn_ext.activation.DEFAULTS[self.activation or "identity"]
        return self.activation_param if self.activation_param is not None else default or 0.0

    def to(self, device: str) -> Arguments:
        tensors = {k: t.to(device) for k, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)


class Result(NamedTuple):
    """The results of one call; the gradients only where they were asked for."""

    output: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dresidual: Tensor | None = None


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.clone()


def run(batch_norm: Callable[..., Tensor], a: Arguments, backward: bool = False) -> Result:
    """Runs ``batch_norm`` on ``a``, with copies of the running statistics."""
    tensors = (a.input, a.weight, a.bias, a.residual)
    leaves = [None if t is None else t.detach().requires_grad_(backward) for t in tensors]
    input, weight, bias, residual = leaves
    fused = (residual, a.activation, a.activation_param)
    if fused == (None, None, None):
        fused = ()
    running = _copy(a.running_mean), _copy(a.running_var)
    with torch.set_grad_enabled(backward):
        output = batch_norm(input, *running, weight, bias, a.training, a.momentum, a.eps, *fused)
    if not backward:
        return Result(output, *running)
    wanted = [t for t in leaves if t is not None]
    grads = dict(zip(map(id, wanted), torch.autograd.grad(output, wanted, a.dy), strict=True))
    return Result(output.detach(), *running, *(grads.get(id(t)) for t in leaves))


def run_ours(a: Arguments, backward: bool = False) -> Result:
    return run(bn_ext.functional.batch_norm, a, backward)


def _torchs(
    input, running_mean, running_var, weight, bias, training, momentum, eps, residual=None, activation=None, param=None
) -> Tensor:
    """Below torch.nn.functional, which in torch 2.11 refuses an eps of 0 in evaluation too."""
    output = torch.batch_norm(
        input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=False
    )
    return bn_ext.activation.apply(output if residual is None else output + residual, activation, param)


def run_torch(a: Arguments, backward: bool = False) -> Result:
    """torch's own; on a GPU not cuDNN, which takes but some of the cases. The one mixture that torch refuses, half
    parameters with float32 statistics, runs with the same parameters held in float32 and its gradients rounded."""
    param = next((t for t in (a.weight, a.bias) if t is not None), None)
    mixed = param is not None and a.running_mean is not None and param.dtype != a.running_mean.dtype
    if mixed:
        wide = {n: None if t is None else t.float() for n, t in (("weight", a.weight), ("bias", a.bias))}
        a = replace(a, **wide)
    r = run(_torchs, a, backward)
    if not mixed:
        return r
    dweight, dbias = (None if t is None else t.to(param.dtype) for t in (r.dweight, r.dbias))
    return r._replace(dweight=dweight, dbias=dbias)


class Expected(NamedTuple):
    """The float64 formulas' results, and the values that set the scale of an error in each: the result itself, or
    terms that cancel in it."""

    result: Result
    scale: Result


def run_reference(a: Arguments, backward: bool = False) -> Expected:
    """The float64 formulas, on inputs without the bulk of their mean: what is left to round is too small to matter.
    On the CPU, where the mean of equal numbers is that number; on a GPU torch multiplies by a reciprocal."""
    a = a.to("cpu")
    others = [d for d in range(a.input.dim()) if d != 1]
    bulk = (a.input.double().mean(others, keepdim=True) / GRAIN).round() * GRAIN
    input, bulk = a.input.double() - bulk, bulk.flatten()
    running = a.running_mean, a.running_var
    if a.training:
        mean, var = reference.statistics(input)
        if a.running_mean is not None:
            running = (
                reference.running(a.running_mean, bulk + mean, a.momentum),
                reference.running(a.running_var, reference.unbiased(input, var), a.momentum),
            )
    else:
        mean, var = a.running_mean.double() - bulk, a.running_var.double()
    z = reference.forward(input, a.weight, a.bias, mean, var, a.eps)
    z = z if a.residual is None else z + a.residual.double()
    result = Result(reference.activated(z, a.activation, a.param), *running)
    scale = result._replace(output=torch.maximum(result.output.abs(), largest(z, a)))
    if not backward:
        return Expected(result, scale)
    dz = reference.behind(a.dy, z, a.activation, a.param)
    dx, dweight, dbias = reference.backward(dz, input, a.weight, mean, var, a.eps, a.training)
    # A slope that varies may be small by chance: what z is off changes it as if it were not.
    steepest = dz if a.activation in (None, "identity", *STRAIGHT) else a.dy.double() * largest(z, a).clamp(min=1)
    # A sum may cancel to next to nothing: it counts as no smaller than terms of random sign would make it.
    x_hat = reference.forward(input, None, None, mean, var, a.eps)
    dweight_size, dbias_size = ((steepest * u).square().sum(others).sqrt() for u in (x_hat, 1))
    dresidual = None if a.residual is None else dz
    scale = Result(
        scale.output,
        *running,
        dx=reference.backward(steepest, input, a.weight, mean, var, a.eps, training=False)[0],
        dweight=torch.maximum(dweight.abs(), dweight_size),
        dbias=torch.maximum(dbias.abs(), dbias_size),
        dresidual=None if a.residual is None else steepest,
    )
    if a.input.dtype == torch.float64:  # the mean is rounded to the same float64, and that error is times dbias
        scale = scale._replace(dweight=scale.dweight + ((bulk + mean) * dbias * (var + a.eps).rsqrt()).abs())
    has_weight, has_bias = a.weight is not None, a.bias is not None
    dweight, dbias = dweight if has_weight else None, dbias if has_bias else None
    return Expected(result._replace(dx=dx, dweight=dweight, dbias=dbias, dresidual=dresidual), scale)


def largest(z: Tensor, a: Arguments) -> Tensor:
    """Of z and the terms that may cancel in it, the largest: the normalized values, the bias and the residual."""
    residual = torch.zeros_like(z) if a.residual is None else a.residual.double()
    bias = torch.zeros_like(z)
    if a.bias is not None:
        bias += a.bias.view(1, -1, *[1] * (z.dim() - 2))
    return torch.stack([t.abs() for t in (z, residual, z - residual, bias)]).amax(0)


# Those of two straight branches, whose gradient takes one bit of z.
STRAIGHT = ("relu", "relu6", "leaky_relu", "hardsigmoid")
KINKS = {
    "relu": (0,),
    "relu6": (0, 6),
    "leaky_relu": (0,),
    "elu": (0,),
    "celu": (0,),
    "hardswish": (-3, 3),
    "hardsigmoid": (-3, 3),
}


def near_kinks(a: Arguments) -> Tensor:
    """Marks elements where rounding could decide on which side of a kink z is."""
    mean, var = reference.statistics(a.input) if a.training else (a.running_mean, a.running_var)
    z = reference.forward(a.input, a.weight, a.bias, mean, var, a.eps)
    z = z if a.residual is None else z + a.residual.double()
    close = 16 * torch.finfo(a.input.dtype).eps * z.abs().amax()
    near = torch.zeros_like(z, dtype=torch.bool)
    for kink in KINKS.get(a.activation or "", ()):
        near |= (z - kink).abs() < close
    return near
