"""The three module classes beside torch's, inputs for them, and comparisons of whole modules."""

from __future__ import annotations

import copy
import inspect
import re

import torch
from compare import assert_as_close
from torch import Tensor, nn

import bn_ext

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
CHANNELS = 6

# The ways in which whole networks become ours.
PREPARATIONS = [bn_ext.convert, lambda model: bn_ext.fuse(bn_ext.convert(model))]
SHAPES = {
    "BatchNorm1d": [(17, CHANNELS), (5, CHANNELS, 7)],
    "BatchNorm2d": [(3, CHANNELS, 5, 7)],
    "BatchNorm3d": [(2, CHANNELS, 3, 4, 5)],
}


def constructible(options: list[dict]) -> list[dict]:
    """Filters constructor arguments by what this torch has: 2.11 knows no bias=False."""
    known = inspect.signature(nn.BatchNorm2d).parameters
    return [one for one in options if one.keys() <= known.keys()]


def ours(name: str) -> type[nn.Module]:
    return getattr(bn_ext, name)


def torchs(name: str) -> type[nn.Module]:
    return getattr(nn, name)


def unmarked(text: str) -> str:
    """The repr of a module of ours, or of a model with such, as torch's has it."""
    return re.sub(r"\n *bn_ext(?=\n)|, bn_ext(?=[)\n])|(?<=\()bn_ext(?=\))", "", text)


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """Our module and torch's with the same random parameters and running statistics."""
    theirs = torchs(name)(*args, **kwargs)
    with torch.no_grad():
        for t in (*theirs.parameters(), theirs.running_mean):
            if t is not None and t.numel():
                t.normal_()
        if theirs.running_var is not None and theirs.running_var.numel():
            theirs.running_var.uniform_(0.5, 2)
    mine = ours(name)(*args, **kwargs)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    return mine, theirs


def assert_same_state(mine: nn.Module, theirs: nn.Module) -> None:
    """Bitwise equal parameters and buffers."""
    one, other = mine.state_dict(), theirs.state_dict()
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), f"{name}: {one[name]} for {other[name]}"


def _step(module: nn.Module, input: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Everything that a forward and backward give, by name."""
    x = input.detach().requires_grad_()
    output = module(x)
    output.backward(dy)
    results = {"output": output.detach(), "dx": x.grad}
    results |= {f"{name}.grad": p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    return results | module.state_dict()


def assert_same_step(mine: nn.Module, theirs: nn.Module, input: Tensor) -> None:
    """A forward and backward by both agree."""
    exactly = copy.deepcopy(theirs).double()
    dy = torch.randn_like(input)
    exact = _step(exactly, input.double(), dy.double())
    one, other = _step(mine, input, dy), _step(theirs, input, dy)
    assert list(one) == list(other)
    for name in one:
        assert_agree(one[name], other[name], exact[name], name)


def assert_agree(mine: Tensor, torchs: Tensor, exact: Tensor, what: str) -> None:
    """Ours is about as near to torch's in float64 as torch's is; in float64 itself, some ulps from torch's.

    The rule with more slack: a module's meaning is in question here, its last digits in the tests of the kernels.
    """
    if mine.dtype == torch.float64:
        torch.testing.assert_close(mine, torchs, rtol=1e-13, atol=1e-13, msg=lambda m: f"{what}: {m}")
        return
    # Inputs are of order one, and what is a sum of them can be no better than they are.
    scale = exact.abs().max().clamp(min=1).expand_as(exact) if exact.numel() else exact
    assert_as_close(mine, torchs, exact, scale, what, slack=3.0)
