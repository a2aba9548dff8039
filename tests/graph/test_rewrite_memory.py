"""Memory that a graph writes to, or code outside may: what is fused then computes what it did."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fusing import Model, assert_same, fused_with, inputs, norm2
from torch import Tensor, nn

import bn_ext
from bn_ext.graph import fusions


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def in_between(write: Callable) -> Callable:
    """To what is added, before it is: the addition may not move to the batch norm."""

    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        y = m.bn2(y)
        write(r)
        return F.relu(y + r)

    return then


def set_item(r: Tensor) -> Tensor:
    r[0] = 1
    return r


WRITES: dict[str, Callable] = {
    "method": lambda r: r.mul_(2),
    "operator": lambda r: operator.imul(r, 2),
    "module": nn.ReLU(inplace=True),
    "function": torch.relu_,
    "option": lambda r: F.relu(r, inplace=True),
    "positional option": lambda r: F.relu(r, True),
    "out": lambda r: torch.mul(r, 2, out=r),
    "view": lambda r: r.view(-1).mul_(2).view_as(r),
    "part": lambda r: [r[0].zero_(), r][1],
    "item": set_item,
    "operator's own": lambda r: torch.ops.aten.mul_.Tensor(r, torch.tensor(2.0, dtype=r.dtype)),
}


@pytest.mark.parametrize("how", WRITES)
def test_what_is_added_is_written_to_in_between(how: str) -> None:
    """The batch norm goes to the addition, past the write, and not the addition to the batch norm."""
    model = Model(in_between(WRITES[how]), **norm2()).double().eval()
    x = inputs()[0]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(bn_ext.fuse(model)(x), expected)
    assert fused_with(model)["bn2"] == (("add", "relu") if how != "item" else ())


@pytest.mark.parametrize("how", [how for how in WRITES if how != "out"])  # which has no gradient
def test_what_is_added_is_written_to_later(how: str) -> None:
    """The backward of a silu would find something else there."""

    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        out = F.silu(y + r)
        return WRITES[how](r) + out

    fused = assert_same(Model(then))
    assert fused_with(fused) == {"bn": ("add",)}
    assert "what is added may be written to" in fusions(fused)[0].reason
    with torch.no_grad():
        fused(inputs()[0].clone())
    assert fused_with(fused) == {"bn": ("add", "silu")}


@pytest.mark.parametrize("act", [F.relu, F.relu6, F.leaky_relu, F.hardsigmoid])
def test_what_is_added_may_be_written_to_where_no_backward_reads_it(act: Callable) -> None:
    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        out = act(y + r)
        return r.mul_(2) + out

    fused = assert_same(Model(then), tolerance=1e-7)
    assert fused_with(fused) == {"bn": ("add", act.__name__)}


def test_what_code_outside_may_write_to_is_not_kept() -> None:
    """A forward may be followed by a write to its input and a backward."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return F.silu(self.bn(self.conv(other)) + x)

    model = bn_ext.fuse(Residual().double())
    x, other = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    y = model(x, other)
    x.zero_()
    y.sum().backward()
    assert fused_with(model) == {"bn": ("add",)}


class Flat(nn.Module):
    """Writes to another input between a batch norm and what is added to its output."""

    def __init__(self, first: Callable) -> None:
        super().__init__()
        self.bn, self.conv, self.first = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), first

    def forward(self, x: Tensor, flat: Tensor, other: Tensor) -> Tensor:
        y = self.bn(self.first(x))
        flat.zero_()
        return F.relu(y + self.conv(other))


@pytest.mark.parametrize("first", [nn.Identity(), nn.Tanh()], ids=["input", "computed"])
@pytest.mark.parametrize("of", ["the input", "the statistics"])
@torch.no_grad()
def test_inputs_may_be_views_of_each_other(of: str, first: Callable) -> None:
    """In a later call of the same graph, too."""
    model = Flat(first).double().eval()
    fused = bn_ext.fuse(copy.deepcopy(model))
    x, other = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    for is_view in (False, True):
        outputs = []
        for m in (model, fused):
            mine, flat = x.clone(), torch.ones(96, dtype=torch.float64)
            if is_view and of == "the input":
                flat = mine.view(-1)
            elif is_view:
                m.bn.running_mean = flat[:3]
            outputs.append(m(mine, flat, other))
        torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("write", [operator.iadd, operator.isub, operator.imul, operator.itruediv])
def test_writing_in_place_stays(write: Callable) -> None:
    def then(m: nn.Module, y: Tensor, r: Tensor) -> Tensor:
        same = r
        write(r, F.relu(y) + 1)
        return same.tanh()

    assert_same(Model(then))


def test_a_bias_that_is_written_to_before_the_backward_is_an_error() -> None:
    """As documented: the backward of the activation reads it."""
    model = bn_ext.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    output = model(torch.randn(2, 3, 4, 4))
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_bias_that_is_no_parameter_is_fused() -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.register_buffer("bias", torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(F.batch_norm(self.conv(x), None, None, None, self.bias, True))

    assert list(fused_with(assert_same(Normalized())).values()) == [("silu",)]
