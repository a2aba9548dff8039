"""One way to run a model: its step, what the step gives, and what the step takes."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bn_ext.tools.profiling import allocated, share_of_ours

_TIMES = 4  # errors of torch that are allowed
_UNITS = 16  # roundings that are allowed besides

Loss = Callable[[Any], Tensor]


def mean_square(outputs: Any) -> Tensor:
    """The mean of the squares of every floating-point output, added up."""
    floating = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not floating:
        raise TypeError(f"no tensor of a floating type in the {type(outputs).__name__} that it returns: give loss=")
    return sum((leaf.float().square().mean() for leaf in floating[1:]), floating[0].float().square().mean())


class Call(NamedTuple):
    """How a model is called."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    loss: Loss
    autocast: torch.dtype | None
    device: torch.device

    def double(self) -> Call:
        """The same in float64, without autocast."""
        args, kwargs = tree_map_only(Tensor, _doubled, (tuple(self.args), dict(self.kwargs)))
        return self._replace(args=args, kwargs=kwargs, autocast=None)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


class Trial:
    """A model with a way to call it. In training mode a step is forward, loss and backward, else it is the forward."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.call, self.training = model, call, model.training

    def forward(self) -> Any:
        call = self.call
        with torch.autocast(call.device.type, call.autocast, enabled=call.autocast is not None):
            return self.model(*call.args, **call.kwargs)

    def forget_gradients(self) -> None:
        for tensor in (*self.model.parameters(), *tree_leaves((self.call.args, self.call.kwargs))):
            if isinstance(tensor, Tensor) and tensor.is_leaf:
                tensor.grad = None

    def loss(self) -> Tensor:
        return self.call.loss(self.forward())

    def step(self) -> Any:
        """The outputs of a step that is done."""
        if self.training:
            self.forget_gradients()
            outputs = self.forward()
            self.call.loss(outputs).backward()
        else:
            with torch.no_grad():
                outputs = self.forward()
        return outputs

    def results(self) -> dict[str, Tensor]:
        """Outputs, gradients and statistics of a step, each as one tensor. Every trial has the same random numbers."""
        with seeded(self.call.device):
            outputs = [leaf for leaf in tree_leaves(self.step()) if isinstance(leaf, Tensor)]
        parameters = [p for _, p in sorted(self.model.named_parameters())]
        return {
            "outputs": _flat(outputs),
            "gradients": _flat([p.grad for p in parameters if p.grad is not None]),
            "statistics": _flat([buffer for _, buffer in sorted(self.model.named_buffers())]),
        }

    def memory(self) -> tuple[int | None, int]:
        """Bytes that the forward keeps for the backward, if there is one, and the peak of the step."""
        device = str(self.call.device)
        self.forget_gradients()  # else they would be freed meanwhile
        kept = allocated(self.loss, device)[0] if self.training else None
        return kept, allocated(self.step, device)[1]

    def share_of_ours(self) -> float:
        """The part of a step's time that our operators take, 0 to 1."""
        return share_of_ours(self.step, str(self.call.device))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All floating-point values, in float64 on the CPU."""
    floating = [t.detach().double().flatten().cpu() for t in tensors if t.is_floating_point()]
    return torch.cat(floating) if floating else torch.empty(0, dtype=torch.float64)


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Runs a block with the same random numbers each time, and restores the random state after it."""
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        random.seed(0)
        try:
            yield
        finally:
            random.setstate(state)


def error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm, of outputs, gradients or statistics: the largest."""
    errors = [0.0]
    for name, exact in expected.items():
        if found[name].shape != exact.shape:
            return float("inf")
        difference, norm = (found[name] - exact).norm().item(), exact.norm().item()
        errors.append(difference / norm if norm else difference)
    return max(errors, key=lambda e: (math.isnan(e), e))


class Judge:
    """Whether a trial gives what the plain model gives, on the scale of the plain model's own error."""

    def __init__(self, plain: nn.Module, call: Call) -> None:
        self.plain, self.call = plain, call
        self.note = ""
        self.torchs: float | None = None
        try:
            self.expected = Trial(copy.deepcopy(plain).double(), call.double()).results()
        except Exception as failure:
            self.note = f"In float64 the model raises {type(failure).__name__}: errors are differences to torch."
            self.expected = Trial(copy.deepcopy(plain), call).results()

    def __call__(self, trial: Trial) -> tuple[float, str]:
        """The error of a trial, and what is wrong with it, or an empty string. Torch's trial has to come first."""
        found = error(trial.results(), self.expected)
        if self.torchs is None:
            self.torchs = found
        elif not found <= self._allowed(self.torchs):
            self.torchs = max(self.torchs, self._rounded)
            if not found <= self._allowed(self.torchs):
                return (
                    found,
                    f"other results: rounding explains errors up to {self._allowed(self.torchs):.1e}",
                )
        return found, ""

    @staticmethod
    def _allowed(error: float) -> float:
        return _TIMES * error + _UNITS * torch.finfo(torch.float32).eps

    @cached_property
    def _rounded(self) -> float:
        """The plain model's error if its inputs and what its batch norms give are rounded once more."""
        from bn_ext.graph.fusion.check import rounded, rounding  # loads the compiler

        args, kwargs = tree_map_only(Tensor, rounded, (tuple(self.call.args), dict(self.call.kwargs)))
        model = copy.deepcopy(self.plain)
        with rounding(model):
            return error(Trial(model, self.call._replace(args=args, kwargs=kwargs)).results(), self.expected)
