"""Whether a way to run a model gives what the plain model gives, on the scale of the plain model's own error."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bn_ext.tools.trial import Call, Trial

_TIMES = 4  # errors of the plain model that are allowed
_UNITS = 16  # roundings that are allowed besides
_ROUNDED = 6  # runs of the plain model with everything rounded once more, at the most

Results = Mapping[str, Tensor]


class Errors(NamedTuple):
    """The errors of one run of the plain model: of each tensor, and the largest of a gradient over its scale."""

    apart: Mapping[str, float]
    of_gradients: float


def _in_double(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.double().cpu()


def difference(one: Tensor, other: Tensor) -> float:
    """The norm of the difference. Equal values, infinite ones too, and pairs of NaN count as 0; infinite if one is."""
    if one.shape != other.shape:
        return math.inf
    one, other = _in_double(one), _in_double(other)
    is_same = (one == other) | (one.isnan() & other.isnan())
    found = torch.where(is_same, 0.0, one - other).norm().item()
    return math.inf if math.isnan(found) else found


def _norm(tensor: Tensor) -> float:
    """Of the finite values."""
    return _in_double(tensor).nan_to_num(0, 0, 0).norm().item()


class Judge:
    """Compares outputs, gradients and buffers with those in float64, each tensor by itself.

    ``error`` is what is shown of it: the norm of the difference over the norm, of all outputs, all gradients or all
    buffers, whichever is largest.
    """

    def __init__(self, plain: nn.Module, call: Call) -> None:
        self.plain, self.call = plain, call
        self.note = ""
        self._made: list[Errors] = []
        self.torchs: Results = Trial(copy.deepcopy(plain), call).results()
        self.expected = self.torchs
        try:
            self.expected = Trial(copy.deepcopy(plain).double(), call.double()).results()
        except Exception as failure:
            self.note = f"In float64 the model raises {type(failure).__name__}: errors are differences to torch."

    def error(self, found: Results) -> float:
        errors = [0.0]
        for kind in ("output", "gradient", "buffer"):
            names = [name for name in self.expected if name.startswith(kind)]
            apart = math.hypot(*(difference(found[name], self.expected[name]) for name in names if name in found))
            norm = self._norms[kind]
            errors.append(apart / norm if norm else apart)
        return max(errors)

    def fault(self, found: Results) -> str:
        """Names a difference that rounding does not explain; empty if it explains all."""
        if missing := sorted(self.torchs.keys() ^ found.keys()):
            return f"other results: {missing[0]} is there in one of the two only"
        for name, expected in self.expected.items():
            apart = difference(found[name], expected)
            if not any(apart <= self._allowed(name, errors) for errors in self._runs()):
                scale = _norm(expected) or 1.0
                allowed = max(self._allowed(name, errors) for errors in self._runs()) / scale
                return f"other results: {name} is off by {apart / scale:.1e}, where rounding explains {allowed:.1e}"
        return ""

    def _allowed(self, name: str, errors: Errors) -> float:
        """The difference that a run with these errors explains; none is explained by a run that is infinitely off."""
        explained = errors.apart[name]
        tensor = self.torchs[name]
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return explained
        explained = _TIMES * explained if math.isfinite(explained) else 0.0
        if name.startswith("gradient"):
            # Rounding turns branches of activations around, and each run's are in other layers.
            explained = max(explained, errors.of_gradients * _norm(self.expected[name]))
        scale = max(self._scale(name), tensor.numel() ** 0.5 * name.startswith("buffer"))
        return explained + _UNITS * torch.finfo(tensor.dtype).eps * scale

    def _scale(self, name: str) -> float:
        """Gradients that are exactly zero, as of a bias before a batch norm, have errors on the scale of the others."""
        return max(_norm(self.expected[name]), self._norms["gradient"] / _UNITS * name.startswith("gradient"))

    @cached_property
    def _norms(self) -> dict[str, float]:
        norms = {"output": 0.0, "gradient": 0.0, "buffer": 0.0}
        for name, tensor in self.expected.items():
            kind = name.partition(" ")[0]
            norms[kind] = math.hypot(norms[kind], _norm(tensor))
        return norms

    def _runs(self) -> Iterator[Errors]:
        """Gives the errors of the plain model, then of rounded ones, each of which runs when it is asked for."""
        for number in range(1 + _ROUNDED):
            if number == len(self._made):
                self._made.append(self._errors(self._rounded(number) if number else self.torchs))
            yield self._made[number]

    def _errors(self, found: Results) -> Errors:
        apart = {name: difference(found[name], expected) for name, expected in self.expected.items()}
        over_scale = (apart[name] / (self._scale(name) or 1.0) for name in apart if name.startswith("gradient"))
        return Errors(apart, max(filter(math.isfinite, over_scale), default=0.0))

    def _rounded(self, seed: int) -> Results:
        """The plain model's results if inputs, parameters and outputs of batch norms are rounded once more."""
        from bn_ext.graph.fusion.check import rounded, rounding  # loads the compiler

        model = copy.deepcopy(self.plain)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(rounded(parameter, seed))
        with rounding(model, seed):
            return Trial(model, self.call.mapped(partial(rounded, seed=seed))).results()
