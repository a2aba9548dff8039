"""adapt: evaluation by a mixture of running and batch statistics."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helped import WAYS, Several, assert_same, images, state
from torch import Tensor, nn

import bn_ext
from bn_ext.train import adapt, freeze


def adapted_by_hand(bn: nn.Module, x: Tensor, alpha: float) -> Tensor:
    """The definition."""
    others = [0, *range(2, x.dim())]
    mean = alpha * bn.running_mean + (1 - alpha) * x.mean(others)
    var = alpha * bn.running_var + (1 - alpha) * x.var(others, unbiased=False)

    def spread(t: Tensor) -> Tensor:
        return t.view(-1, *[1] * (x.dim() - 2))

    return (x - spread(mean)) / spread(var + bn.eps).sqrt() * spread(bn.weight) + spread(bn.bias)


def module(cls: type = bn_ext.BatchNorm2d, **options) -> nn.Module:
    bn = cls(3, **options).double()
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn.eval()


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_values_and_gradients(alpha: float, activation: str | None) -> None:
    bn = module()
    adapt(bn, alpha)
    x = (images().double() * 2).requires_grad_()
    for residual in (None, torch.randn_like(x, requires_grad=True), torch.randn(3, 1, 1, dtype=torch.float64)):
        output = bn(x, residual, activation=activation)
        z = adapted_by_hand(bn, x, alpha)
        z = z if residual is None else z + residual
        expected = getattr(F, activation)(z) if activation else z
        inputs = [t for t in (x, bn.weight, bn.bias, residual) if t is not None and t.requires_grad]
        dy = torch.randn_like(output)
        got = torch.autograd.grad(output, inputs, dy)
        torch.testing.assert_close([output, *got], [expected, *torch.autograd.grad(expected, inputs, dy)])


@pytest.mark.parametrize("way", WAYS)
def test_a_model_and_back(way: str) -> None:
    torch._dynamo.reset()
    model = Several(functions=False)
    model(images())
    by_hand = copy.deepcopy(model).eval()
    before, parameters = state(model), list(model.parameters())
    call = WAYS[way](model.eval())
    x = images()
    plain = call(x)
    record = adapt(model, 0.25)
    assert record.rows[0] == ("theirs", "BatchNorm2d", "evaluates by 0.25 running + 0.75 batch statistics")
    for name in ("theirs", "ours"):
        bn = getattr(by_hand, name)
        bn.forward = lambda x, residual=0, bn=bn: adapted_by_hand(bn, x, 0.25) + residual
    by_hand.activated.forward = lambda x: adapted_by_hand(by_hand.activated, x, 0.25).relu()
    torch.testing.assert_close(call(x), by_hand(x), rtol=1e-4, atol=1e-4)
    adapt(model, 1)
    torch.testing.assert_close(call(x), plain)
    assert_same(state(model), before)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert "running_share" not in vars(model.ours)


def test_ends_and_copies() -> None:
    """0 is the batch's own statistics, as in training; copies and pickles stay adapted; the record undoes one call."""
    bn, x = module(), images().double()
    adapt(bn, 0)
    before = state(bn)
    torch.testing.assert_close(bn(x), copy.deepcopy(bn).train()(x))
    assert_same(state(bn), before)
    for copied in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert torch.equal(copied(x), bn(x))
    record = adapt(bn, 0.5)
    record.undo()
    assert bn.running_share == 0
    assert "running_share=0" in repr(bn)
    training = bn.train()(x)
    adapt(bn, 1)
    bn.load_state_dict(before)
    assert torch.equal(bn(x), training)
    freeze(bn)
    adapt(bn.train(), 0)
    torch.testing.assert_close(bn(x), training)


def test_refusals_and_other_tools() -> None:
    bn, x = module(), images().double()
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alpha should be from 0 to 1"):
            adapt(bn, wrong)
    adapt(bn, 0.5)
    with pytest.raises(torch.jit.Error, match=r"TorchScript has no form of .*adapted"):
        torch.jit.script(bn)(x)
    with pytest.raises(ValueError, match="the model is adapted"):
        bn_ext.revert(bn)
    model = nn.Sequential(nn.Conv2d(3, 3, 1).double(), bn).eval()
    folded = bn_ext.fold(model, x)
    torch.testing.assert_close(folded(x), model(x))
    assert [fold.into for fold in bn_ext.graph.folds(folded)] == [""]
    x.requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(lambda t: bn(t).square().sum())(x), torch.autograd.grad(bn(x).square().sum(), x)[0]
    )
    exported = torch.export.export(bn, (x,))
    torch.testing.assert_close(exported.module()(x), bn(x))
    assert "bn_ext" not in str(exported.graph)


def test_half_precision_and_dropout() -> None:
    bn = nn.Sequential(module(bn_ext.BatchNormAct2d, activation="relu").float(), nn.Dropout(0.9)).eval()
    adapt(bn, 0.5)
    x = images()
    torch.testing.assert_close(bn(x.bfloat16()).float(), bn(x), rtol=0.05, atol=0.05)
