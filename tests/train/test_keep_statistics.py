"""keep_statistics: forwards in training that leave statistics alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helped import WAYS, Several, assert_same, images, state
from torch import nn

import bn_ext
from bn_ext.train import keep_statistics


@pytest.mark.parametrize("way", WAYS)
def test_statistics_stay(way: str) -> None:
    """Inside the outputs are those of training, and nothing is written; outside, before and after, it is as ever."""
    torch._dynamo.reset()
    model = Several()
    model.drop.p = 0.0
    plain = copy.deepcopy(model)
    call = WAYS[way](model)
    for inside in (False, True, False, True):
        x, before = images(), state(model)
        if inside:
            with keep_statistics(model):
                output = call(x)
            assert_same(state(model), before)
            expected = copy.deepcopy(plain)(x)
        else:
            output, expected = call(x), plain(x)
            assert not torch.equal(model.mean, before["mean"])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)


def test_evaluation_and_gradients() -> None:
    model, x = Several(functions=False), images().requires_grad_()
    plain = copy.deepcopy(model)
    with keep_statistics(model), keep_statistics(model.ours):
        torch.manual_seed(0)
        (mine,) = torch.autograd.grad(model(x).square().sum(), x)
        assert torch.equal(model.eval()(x), plain.eval()(x))
    torch.manual_seed(0)
    (theirs,) = torch.autograd.grad(plain.train()(x).square().sum(), x)
    assert torch.equal(mine, theirs)


def test_ends_with_an_exception() -> None:
    model = Several()
    model.ours.track_running_stats = False
    with pytest.raises(RuntimeError, match="channels"), keep_statistics(model):
        model(torch.zeros(2, 5, 7, 7))
    assert [m.track_running_stats for m in (model.theirs, model.ours, model.activated)] == [True, False, True]
    model.ours.track_running_stats = True
    model(images())
    assert model.theirs.num_batches_tracked == model.ours.num_batches_tracked == 1
    assert model.mean.any()


def test_record_and_refusals() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with keep_statistics(model) as record:
        assert record.rows == [("1", "BatchNorm1d", "running statistics and counter stay")]
    scripted = nn.Sequential(nn.ReLU(), torch.jit.script(bn_ext.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="1 is in TorchScript"), keep_statistics(scripted):
        pass
    with pytest.raises(ValueError, match="0 is not initialized"), keep_statistics(nn.Sequential(nn.LazyBatchNorm1d())):
        pass
    with (
        pytest.raises(TypeError, match=r"train.keep_statistics: model should be a torch.nn.Module"),
        keep_statistics(3),
    ):
        pass
