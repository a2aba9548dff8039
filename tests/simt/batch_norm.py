"""The CUDA backend, run on the model of a GPU, as a function of CPU tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_bool, c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from simt.build import HERE, ROOT, Library, library
from torch import Tensor

from bn_ext import activation

PASSES = "passes/forward.cu", "passes/backward.cu", "passes/mask.cu"
ALL, REDUCE, APPLY = range(3)  # Stages of csrc/core/pass.h
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # the order of csrc/core/problem.h

# The structures of csrc/core/arguments.h and csrc/core/pass.h.


class Device(ctypes.Structure):
    """Limits of a GPU."""

    _fields_ = [
        ("multiprocessors", c_int),
        ("shared_per_block", c_int64),
        ("shared_per_multiprocessor", c_int64),
        ("max_cluster", c_int),
    ]


class Problem(ctypes.Structure):
    _fields_ = [
        ("layout", c_int),
        ("dtype", c_int),
        ("n", c_int64),
        ("c", c_int64),
        ("s", c_int64),
        ("per_set", c_int64),
    ]


class Wants(ctypes.Structure):
    _fields_ = [("dx", c_bool), ("dresidual", c_bool), ("dweight", c_bool), ("dbias", c_bool)]


class Chain(ctypes.Structure):
    _fields_ = [("activation", c_int), ("residual", c_bool), ("branches", c_bool)]


class Pass(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("direction", c_int),
        ("training", c_bool),
        ("wants", Wants),
        ("chain", Chain),
        ("stages", c_int),
        ("masked", c_bool),
    ]


class PerChannel(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int), ("stride", c_int64), ("set_stride", c_int64)]


class Mask(ctypes.Structure):
    _fields_ = [("values", c_void_p), ("counted", c_void_p)]


class Activation(ctypes.Structure):
    _fields_ = [("kind", c_int), ("param", c_double)]


class Epilogue(ctypes.Structure):
    _fields_ = [("activation", Activation), ("residual", c_void_p), ("branches", c_void_p)]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("stages", c_int),
        ("x", c_void_p),
        ("mask", Mask),
        ("weight", PerChannel),
        ("bias", PerChannel),
        ("running_mean", PerChannel),
        ("running_var", PerChannel),
        ("num_batches_tracked", c_void_p),
        ("training", c_bool),
        ("cumulative", c_bool),
        ("momentum", c_double),
        ("eps", c_double),
        ("epilogue", Epilogue),
        ("y", c_void_p),
        ("mean", c_void_p),
        ("invstd", c_void_p),
        ("m2", c_void_p),
        ("counts", c_void_p),
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("problem", Problem),
        ("stages", c_int),
        ("dy", c_void_p),
        ("x", c_void_p),
        ("mask", Mask),
        ("weight", PerChannel),
        ("bias", PerChannel),
        ("mean", c_void_p),
        ("invstd", c_void_p),
        ("training", c_bool),
        ("epilogue", Epilogue),
        ("dx", c_void_p),
        ("dresidual", c_void_p),
        ("dweight", PerChannel),
        ("dbias", PerChannel),
        ("sum_dz", c_void_p),
        ("sum_dz_xmu", c_void_p),
        ("counts", c_void_p),
    ]


class MergeArgs(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        ("c", c_int64),
        ("counts", c_void_p),
        ("means", c_void_p),
        ("m2s", c_void_p),
        ("running_mean", PerChannel),
        ("running_var", PerChannel),
        ("num_batches_tracked", c_void_p),
        ("momentum", c_double),
        ("eps", c_double),
        ("count", c_void_p),
        ("mean", c_void_p),
        ("invstd", c_void_p),
    ]


# As the sizes in batch_norm.cpp. Pass is not among them.
MIRRORED = (Device, Problem, PerChannel, Mask, Activation, Epilogue, ForwardArgs, BackwardArgs, MergeArgs)


def check_sizes(library: ctypes.CDLL) -> None:
    """A structure that differs from its twin in C++ would be read as garbage."""
    sizes = (c_int64 * len(MIRRORED)).in_dll(library, "bn_sizes")
    for twin, size in zip(MIRRORED, sizes, strict=True):
        assert ctypes.sizeof(twin) == size, f"{twin.__name__} has {ctypes.sizeof(twin)} bytes, in C++ {size}"


class Tail(NamedTuple):
    """The residual, activation and branch bits of a call; a forward writes the bits, a backward reads them."""

    activation: str = "identity"
    param: float = 0
    residual: Tensor | None = None
    branches: Tensor | None = None

    def epilogue(self) -> Epilogue:
        kind = Activation(activation.NAMES.index(self.activation), self.param)
        return Epilogue(kind, address(self.residual), address(self.branches))


NOTHING = Tail()


def empty_branches(x: Tensor) -> Tensor:
    return torch.full((-(-x.numel() // 32) * 4,), 0xA5, dtype=torch.uint8)


def problem_of(x: Tensor, set_size: int | None = None) -> Problem:
    """The problem of a tensor that is dense in one of the two layouts."""
    n, c, s = x.size(0), x.size(1), x[0, 0].numel()
    assert x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    return Problem(not x.is_contiguous(), DTYPES.index(x.dtype), n, c, s, min(set_size or n, n))


def per_channel(t: Tensor | None) -> PerChannel:
    return PerChannel() if t is None else PerChannel(t.data_ptr(), DTYPES.index(t.dtype), t.stride(0))


def mask_of(mask: Tensor | None, x: Tensor) -> Mask:
    """A mask (N, *) of numbers of the accumulation type. It lives as long as the tensor."""
    if mask is None:
        return Mask()
    assert mask.is_contiguous() and mask.shape == (x.size(0), *x.shape[2:])
    assert mask.dtype == torch.promote_types(x.dtype, torch.float32)
    return Mask(mask.data_ptr())


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def like(t: Tensor) -> Tensor:
    """A tensor laid out as ``t`` and full of NaN, so that an element that is not written shows."""
    return torch.empty_like(t).fill_(torch.nan)


def statistics(x: Tensor, set_size: int | None, number: int) -> Tensor:
    """Space for this many statistics of each set and channel, full of NaN."""
    sets = [] if set_size is None else [-(-x.size(0) // set_size)]
    return torch.full((number, *sets, x.size(1)), torch.nan, dtype=torch.float64)


class Kernels:
    """The backend, compiled for the model. Files under ``include`` replace files of ``csrc`` for the ``changed``
    passes. Without them, kernels for AddressSanitizer know float and bfloat16 alone."""

    def __init__(
        self,
        name: str = "batch_norm",
        *,
        sanitize: bool = False,
        include: Sequence[Path] = (),
        changed: Sequence[str] = PASSES,
    ) -> None:
        include = include or ([HERE / "narrow"] if sanitize else [])
        changed = changed if include else ()
        folders = [folder / "cuda" for folder in (*include, ROOT / "csrc")]
        of_changed = [next(f for f in (folder / file for folder in folders) if f.exists()) for file in changed]
        same = "plan.cpp", "passes/merge_rows.cu", *(file for file in PASSES if file not in changed)
        sources = [HERE / "batch_norm.cpp", *(ROOT / "csrc/cuda" / file for file in same)]
        built = library(name, sources, sanitize=sanitize, changed=of_changed, include=include)
        self.library = Library(str(built))
        check_sizes(self.library)
        self.library.batch_norm_forward.argtypes = [POINTER(ForwardArgs), POINTER(Device)]
        self.library.batch_norm_backward.argtypes = [POINTER(BackwardArgs), POINTER(Device)]
        self.library.batch_norm_merge_rows.argtypes = [POINTER(MergeArgs)]

    def configure(self, seed: int = 0, preempt: int = 0, resident_blocks: int = 1 << 20) -> None:
        """The order of threads from here on, and the most blocks of a grid (model.h)."""
        self.library.configure(seed, preempt=preempt, resident_blocks=resident_blocks)

    def launches(self) -> int:
        """The number of launches since ``configure``, with those that were refused."""
        return len(self.library.launches())

    def plan(self, call: Pass, device: Device) -> str:
        """Strategy and team."""
        name = ctypes.create_string_buffer(64)
        self.library.name_plan(byref(call), byref(device), name)
        return name.value.decode()

    def forward(
        self,
        device: Device,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        batches: Tensor | None = None,
        tail: Tail = NOTHING,
        set_size: int | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, (mean, invstd, m2) = like(x), statistics(x, set_size, 3)
        of_channels = map(per_channel, (weight, bias, running_mean, running_var))
        cumulative = momentum is None and batches is not None
        how = address(batches), training, cumulative, momentum or 0, eps, tail.epilogue()
        rest = *how, *map(address, (y, mean, invstd, m2))
        of_values = problem_of(x, set_size), ALL, address(x), mask_of(mask, x)
        self.library.batch_norm_forward(ForwardArgs(*of_values, *of_channels, *rest), device)
        return y, mean, invstd

    def backward(
        self,
        device: Device,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        training: bool = True,
        wanted: Sequence[bool] = (True, True, True, False),
        tail: Tail = NOTHING,
        set_size: int | None = None,
        *,
        mask: Tensor | None = None,
        reads_x: bool = True,
    ) -> tuple[Tensor | None, ...]:
        """The wanted gradients, in the order of autograd: of input, weight, bias and residual."""
        of_parameter = x.new_empty(x.size(1), dtype=torch.promote_types(x.dtype, torch.float32))
        parameter = of_parameter if weight is None else weight
        gradients = [like(t) if w else None for t, w in zip((x, parameter, parameter, x), wanted, strict=True)]
        dx, dweight, dbias, dresidual = gradients
        inputs = (
            problem_of(x, set_size),
            ALL,
            address(dy),
            address(x if reads_x else None),
            mask_of(mask, x),
            *map(per_channel, (weight, bias)),
            address(mean),
            address(invstd),
        )
        sums = statistics(x, set_size, 2)
        outputs = address(dx), address(dresidual), per_channel(dweight), per_channel(dbias), *map(address, sums)
        self.library.batch_norm_backward(BackwardArgs(*inputs, training, tail.epilogue(), *outputs), device)
        return tuple(gradients)

    def stats(
        self, device: Device, x: Tensor, set_size: int | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The count of each set, the mean and m2 of each set and channel."""
        mean, m2 = statistics(x, set_size, 2)
        counts = mean.new_full(mean.shape[:-1] or (1,), torch.nan)
        nothing = [PerChannel()] * 4
        rest = None, True, False, 0, 0, NOTHING.epilogue(), None, address(mean), None, *map(address, (m2, counts))
        args = ForwardArgs(problem_of(x, set_size), REDUCE, address(x), mask_of(mask, x), *nothing, *rest)
        self.library.batch_norm_forward(args, device)
        return counts, mean, m2

    def merge_stats(
        self,
        counts: Tensor,
        means: Tensor,
        m2s: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        batches: Tensor | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The count, mean and invstd of all rows; ``batches`` asks for a cumulative average."""
        c = means.size(-1)
        count, (mean, invstd) = torch.full((), torch.nan).double(), torch.full((2, c), torch.nan, dtype=torch.float64)
        rows = (
            counts.numel(),
            c,
            *map(address, (counts, means, m2s)),
            per_channel(running_mean),
            per_channel(running_var),
        )
        results = map(address, (count, mean, invstd))
        self.library.batch_norm_merge_rows(MergeArgs(*rows, address(batches), momentum, eps, *results))
        return count, mean, invstd

    def elemt(
        self,
        device: Device,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        set_size: int | None = None,
        tail: Tail = NOTHING,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The output, normalized with these statistics."""
        y, nothing = like(x), PerChannel()
        of_channels = *map(per_channel, (weight, bias)), nothing, nothing
        rest = None, True, False, 0, 0, tail.epilogue(), *map(address, (y, mean, invstd)), None
        args = ForwardArgs(problem_of(x, set_size), APPLY, address(x), mask_of(mask, x), *of_channels, *rest)
        self.library.batch_norm_forward(args, device)
        return y

    def backward_stage(
        self,
        device: Device,
        inputs: Sequence[Tensor | None],
        sums: Tensor,
        counts: Tensor | None = None,
        outputs: Sequence[Tensor | None] = (None, None),
        set_size: int | None = None,
        tail: Tail = NOTHING,
        mask: Tensor | None = None,
    ) -> None:
        """The reduction of dy, x, weight, bias, mean and invstd to the two sums; or with counts the gradients, dx and
        dresidual, that follow from these."""
        dy, x, weight, bias, mean, invstd = inputs
        of_values = *map(address, (dy, x)), mask_of(mask, x)
        tensors = *of_values, *map(per_channel, (weight, bias)), *map(address, (mean, invstd))
        results = *map(address, outputs), PerChannel(), PerChannel(), *map(address, sums), address(counts)
        stages = REDUCE if counts is None else APPLY
        args = BackwardArgs(problem_of(x, set_size), stages, *tensors, True, tail.epilogue(), *results)
        self.library.batch_norm_backward(args, device)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, device: Device, x: Any, weight: Any, bias: Any, *rest: Any) -> Tensor:
        running_mean, running_var, training, momentum, eps = rest
        y, *statistics = kernels.forward(device, x, running_mean, running_var, weight, bias, training, momentum, eps)
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.rest = kernels, device, training
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        kernels, device, training = ctx.rest
        dy = like(x).copy_(dy)
        wanted = *ctx.needs_input_grad[2:5], False
        return None, None, *kernels.backward(device, dy, x, *others, training, wanted)[:3], *[None] * 5


def batch_norm(kernels: Kernels, device: Device) -> Callable[..., Tensor]:
    """torch.nn.functional.batch_norm by these kernels, for dense tensors."""

    def call(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, *rest: Any) -> Tensor:
        return _BatchNorm.apply(kernels, device, x, weight, bias, running_mean, running_var, *rest)

    return call
