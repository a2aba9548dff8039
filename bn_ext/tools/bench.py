"""One shape measured: batch norm with what follows it in the same call, against torch's functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bn_ext import activation as activations
from bn_ext import reference
from bn_ext._table import Table
from bn_ext.functional import batch_norm
from bn_ext.tools.machine import CHANNELS_LAST, Others, described, where
from bn_ext.tools.timing import duration, interleave, percentiles, ratios, sampler

Norm = tuple[Tensor, Tensor, Tensor, Tensor]  # running mean and variance, weight, bias
Way = Callable[[Tensor, "Tensor | None", Norm, bool], Tensor]

EPS, MOMENTUM = 1e-5, 0.1
ROUNDS = 7  # at the least
_TIMES, _UNITS = 4, 4  # errors of torch that are allowed, and roundings besides
TORCH, OURS, COPY = "torch", "bn_ext", "copy"
# Activations whose gradient torch computes from their result: in place, they keep nothing twice.
_IN_PLACE = ("relu", "relu6", "leaky_relu", "elu")


_HEAD = ("", "torch", "bn_ext", "speed-up", "of a copy's rate", "error", "torch's error")
_RESULTS = {
    "forward": ("output", "running_mean", "running_var"),
    "backward": ("dx", "dweight", "dbias", "dresidual"),
    "forward + backward": ("dx", "dweight", "dbias", "dresidual"),
    "inference": ("inferred",),
}


class Pattern(NamedTuple):
    """``activation(batch_norm(input) + residual)``, the last two optional."""

    activation: activations.Name | None = None
    residual: bool = False

    def __str__(self) -> str:
        sum = "batch_norm(x) + residual" if self.residual else "batch_norm(x)"
        return f"{self.activation}({sum})" if self.activation else sum

    def ours(self, x: Tensor, residual: Tensor | None, norm: Norm, training: bool) -> Tensor:
        return batch_norm(x, *norm, training, MOMENTUM, EPS, residual, self.activation)

    def torchs(self, x: Tensor, residual: Tensor | None, norm: Norm, training: bool) -> Tensor:
        """The pattern as it is usually written for speed: in place where that loses nothing."""
        y = F.batch_norm(x, *norm, training, MOMENTUM, EPS)
        if residual is not None:
            y += residual
        if self.activation in _IN_PLACE:
            return getattr(F, self.activation)(y, inplace=True)
        return activations.apply(y, self.activation, None)


def bench(
    shape: Sequence[int],
    pattern: Pattern = Pattern(),  # noqa: B008, immutable
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str = "cpu",
    seconds: float = 1.0,
) -> Table:
    """Times ``pattern`` in training and inference, torch's and ours and a plain copy in turn, results checked first.

    Args:
        shape: of the input, (N, C, *).
        dtype: of input and residual; parameters and statistics are float32, of float64 inputs float64.
        channels_last: the layout of input and residual, which have four or five dimensions then.
        seconds: for each pass, at the least.

    Raises:
        ValueError: a shape of one dimension, of one value per channel, or that has no layout with channels last.
        AssertionError: the results differ from float64 by more than torch's.
    """
    workload = Workload(shape, pattern, dtype, channels_last, torch.device(device))
    errors = workload.check()
    rows, others = [], Others()
    for passed, moves in workload.moves().items():
        calls = {name: workload.call(way, passed) for name, way in workload.ways.items()}
        calls[COPY] = partial(torch.empty_like(workload.x).copy_, workload.x.detach())
        with torch.set_grad_enabled(passed != "inference"):
            samples, _ = interleave(calls, seconds, ROUNDS, sampler(workload.x.device))
        low, middle, high = percentiles(ratios(samples, TORCH, OURS))
        times = [duration(median(samples[name])) for name in (TORCH, OURS)]
        of_copy = moves / 2 * median(ratios(samples, COPY, OURS))
        rows.append(
            (
                passed,
                *times,
                f"{middle:.2f}x ({low:.2f} to {high:.2f})",
                f"{100 * of_copy:.0f} %",
                *(f"{error:.1e}" for error in errors[passed]),
            )
        )
    return Table(_HEAD, rows, [workload.title()], others.notes())


class Workload:
    """Random tensors of one shape, and the exact results."""

    def __init__(
        self, shape: Sequence[int], pattern: Pattern, dtype: torch.dtype, channels_last: bool, device: torch.device
    ) -> None:
        if len(shape) < 2:
            raise ValueError(f"bench: a shape has two dimensions or more, got {'x'.join(map(str, shape))}")
        if math.prod(shape) == shape[1]:
            raise ValueError(f"bench: training takes more than one value per channel, got {'x'.join(map(str, shape))}")
        if channels_last and len(shape) not in CHANNELS_LAST:
            raise ValueError(f"bench: channels last has four or five dimensions, got {'x'.join(map(str, shape))}")
        format = CHANNELS_LAST[len(shape)] if channels_last else torch.contiguous_format
        random = torch.Generator(device).manual_seed(0)
        of_channels = dtype if dtype == torch.float64 else torch.float32

        def tensor() -> Tensor:
            return torch.randn(shape, generator=random, device=device).to(dtype).to(memory_format=format)

        def uniform() -> Tensor:
            return torch.rand(shape[1], generator=random, device=device, dtype=of_channels) + 0.5

        self.pattern = pattern
        self.ways: dict[str, Way] = {TORCH: pattern.torchs, OURS: pattern.ours}
        self.x, self.dy = tensor(), tensor()
        self.residual = tensor() if pattern.residual else None
        self.mean, self.var, self.weight, self.bias = (uniform() for _ in range(4))
        norm = (self.mean, self.var, self.weight, self.bias)
        ends = (MOMENTUM, EPS, (pattern.activation, activations.DEFAULTS[pattern.activation or "identity"] or 0.0))
        self.exact = reference.results(self.x, self.residual, self.dy, norm, True, *ends)
        self.exact["inferred"] = reference.results(self.x, self.residual, self.dy, norm, False, *ends)["output"]
        self.leaves = {"dx": self.x, "dweight": self.weight, "dbias": self.bias}
        if self.residual is not None:
            self.leaves["dresidual"] = self.residual
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    def title(self) -> str:
        return f"{self.pattern}, x of {described(self.x)}, {where(self.x.device)}"

    def moves(self) -> dict[str, int]:
        """The least that each pass reads and writes, in tensors of the input's size."""
        more = int(self.pattern.residual)
        forward, backward = 2 + more, 3 + more
        passes = (forward, backward, forward + backward, forward)
        return dict(zip(_RESULTS, passes))

    def call(self, way: Way, passed: str) -> Callable[[], object]:
        norm = (self.mean.clone(), self.var.clone(), self.weight, self.bias)
        forward = partial(way, self.x, self.residual, norm, passed != "inference")
        leaves = list(self.leaves.values())
        if passed == "backward":
            y = forward()
            return lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)
        return forward if passed != "forward + backward" else lambda: torch.autograd.grad(forward(), leaves, self.dy)

    def check(self) -> dict[str, tuple[float, float]]:
        """For each pass, our largest error and torch's.

        Raises:
            AssertionError: ours is larger than torch's explains, or torch's keeps less than half of the digits.
        """
        errors = {name: self._errors(way) for name, way in self.ways.items()}
        found = {}
        for passed, results in _RESULTS.items():
            ours, torchs = (max(errors[name][result] for result in results) for name in (OURS, TORCH))
            eps = torch.finfo(self.x.dtype).eps
            if not (torchs <= eps**0.5 and ours <= _TIMES * torchs + _UNITS * eps):
                raise AssertionError(f"bench: {passed} is off by {ours:.1e}, torch's by {torchs:.1e}")
            found[passed] = ours, torchs
        return found

    def _errors(self, way: Way) -> dict[str, float]:
        """The largest error of each result, relative to the largest value expected; 0 for a missing result."""
        norm = (self.mean.clone(), self.var.clone(), self.weight, self.bias)
        y = way(self.x, self.residual, norm, True)
        found = dict(zip(self.leaves, torch.autograd.grad(y, list(self.leaves.values()), self.dy)))
        found |= {"output": y, "running_mean": norm[0], "running_var": norm[1]}
        with torch.no_grad():
            found["inferred"] = way(self.x, self.residual, (self.mean, self.var, *norm[2:]), False)
        errors = {name: (t.detach().double() - self.exact[name]).abs().max() for name, t in found.items()}
        return {"dresidual": 0.0} | {name: (e / self.exact[name].abs().max()).item() for name, e in errors.items()}
