"""skip_nonfinite: batches with Inf or NaN that leave statistics as they were."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helped import WAYS, Several, assert_same, images, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bn_ext
from bn_ext.train import skip_nonfinite

# With gradients of the graph as a whole, in which the statistics are inputs that are written to.
WHOLLY_COMPILED = {"wholly compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)}


@pytest.mark.parametrize("way", ["plain", "converted", "fused", "wholly compiled"])
def test_batches_that_are_not_finite_leave_no_trace(way: str) -> None:
    torch._dynamo.reset()
    model = Several(functions=False)
    model.drop.p = 0.0
    plain = copy.deepcopy(model)
    call = (WAYS | WHOLLY_COMPILED)[way](model)
    for bad in (None, math.inf, None, math.nan):
        x = images()
        with skip_nonfinite(model):
            if bad is None:
                torch.testing.assert_close(call(x), plain(x), rtol=1e-4, atol=1e-4)
            else:
                before = state(model)
                x[1, 2, 3, 3] = bad
                x.requires_grad_()
                output = call(x)
                output.sum().backward()
                assert output.isnan().any()
                assert x.grad.isnan().any()
                assert_same(state(model), before)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)
    x = images().fill_(math.inf)
    call(x)
    assert model.theirs.running_mean.isnan().any(), "outside it is as ever"


def test_each_layer_decides_for_itself() -> None:
    """An overflow of the statistics counts too; layers before it have a finite batch."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), bn_ext.BatchNorm1d(2))
    with torch.no_grad():
        model[1].weight.fill_(1e30)
    before = state(model)
    with skip_nonfinite(model):
        model(torch.randn(5, 2))
    assert model[0].num_batches_tracked == 1
    assert model[2].num_batches_tracked == 0
    assert_same(
        {k: v for k, v in state(model).items() if k[0] == "2"}, {k: v for k, v in before.items() if k[0] == "2"}
    )


class Synchronizations(TorchDispatchMode):
    """Operators that would have the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "a wait"
        assert func is not torch.ops.aten.is_nonzero.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing() -> None:
    """On the meta device there is nothing to wait for."""
    model = Several(functions=False)
    with skip_nonfinite(model), Synchronizations():
        model(images())
    meta = Several(functions=False).to("meta")
    with skip_nonfinite(meta):
        meta(torch.empty(6, 3, 7, 7, device="meta"))


def test_classes_come_back() -> None:
    model = bn_ext.convert(Several())
    nn.utils.parametrizations.weight_norm(model.ours)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), skip_nonfinite(model) as record:
        assert isinstance(model.theirs, bn_ext.BatchNorm2d)
        assert [row[:2] for row in record.rows] == [
            ("theirs", "BatchNorm2d"),
            ("ours", "BatchNorm2d"),
            ("activated", "BatchNormAct2d"),
        ]
        model(images())
        raise ZeroDivisionError
    assert [type(m).__mro__[1:] for m in model.modules()] == [c.__mro__[1:] for c in classes]
    with skip_nonfinite(model), skip_nonfinite(model):
        model(images())
    assert model.ours.num_batches_tracked == 2
