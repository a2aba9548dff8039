"""bn_ext.convert and revert: classes change, everything else is the same object."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bn_ext

PAIRS = [
    (nn.BatchNorm1d, bn_ext.BatchNorm1d),
    (nn.BatchNorm2d, bn_ext.BatchNorm2d),
    (nn.BatchNorm3d, bn_ext.BatchNorm3d),
]


class Own(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class OwnOfOurs(bn_ext.BatchNorm2d):
    pass


def network() -> nn.Module:
    shared = nn.BatchNorm2d(4)
    block = nn.ModuleDict({"norm": nn.BatchNorm2d(4, momentum=None), "again": shared})
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, block["norm"], shared, nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4))
    )


@pytest.mark.parametrize(("theirs", "mine"), PAIRS)
def test_the_model_itself(theirs: type, mine: type) -> None:
    module = theirs(3)
    assert bn_ext.convert(module) is module
    assert type(module) is mine
    assert bn_ext.revert(module) is module
    assert type(module) is theirs


def test_nothing_but_the_class_changes() -> None:
    model = network().eval()
    norm = model[1]
    seen = []
    norm.register_forward_hook(lambda *_: seen.append("hook"))
    norm.weight.requires_grad_(False)
    norm.note = "kept"
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    assert bn_ext.convert(model) is model
    for module, (same, attributes, parameters, buffers) in zip(model.modules(), before, strict=True):
        assert module is same
        assert vars(module) == attributes
        assert all(module._parameters[k] is p for k, p in parameters.items())
        assert all(module._buffers[k] is b for k, b in buffers.items())
    assert model[1] is model[3]
    model(torch.randn(2, 3, 5, 5))
    assert seen == ["hook"] * 2


def test_every_module_is_converted_and_reverted() -> None:
    model = network()
    types = [type(m) for m in model.modules()]
    ours = dict(PAIRS)
    assert [type(m) for m in bn_ext.convert(model).modules()] == [ours.get(t, t) for t in types]
    assert [type(m) for m in bn_ext.convert(model).modules()] == [ours.get(t, t) for t in types], "twice"
    assert [type(m) for m in bn_ext.revert(model).modules()] == types
    assert [type(m) for m in bn_ext.revert(model).modules()] == types, "twice"


@pytest.mark.parametrize("make", [Own, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm])
def test_left_alone(make: type) -> None:
    module = make(2, 4) if make is nn.GroupNorm else make(4)
    for change in (bn_ext.convert, bn_ext.revert):
        assert type(change(nn.Sequential(module))[0]) is make


def test_lazy_modules_are_left_alone() -> None:
    model = bn_ext.convert(nn.Sequential(nn.LazyBatchNorm2d()))
    assert type(model[0]) is nn.LazyBatchNorm2d
    model(torch.randn(2, 3, 4, 4))
    assert type(bn_ext.convert(model)[0]) is bn_ext.BatchNorm2d


def test_subclasses_of_ours_are_not_reverted() -> None:
    assert type(bn_ext.revert(nn.Sequential(OwnOfOurs(4)))[0]) is OwnOfOurs


def test_same_training(device: str) -> None:
    """A converted network trains as the original, with the optimizer made before."""
    torch.manual_seed(1)
    original = network().to(device)
    converted = copy.deepcopy(original)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (original, converted)]
    bn_ext.convert(converted)
    for _ in range(4):
        input = torch.randn(4, 3, 7, 7, device=device)
        for model, optimizer in zip((original, converted), optimizers, strict=True):
            optimizer.zero_grad()
            model(input).square().mul(torch.arange(25, device=device)).mean().backward()
            optimizer.step()
    torch.testing.assert_close(converted.state_dict(), original.state_dict())
    bn_ext.revert(converted).eval(), original.eval()
    torch.testing.assert_close(converted(input), original(input))


def test_state_dict_keys_are_unchanged() -> None:
    model = network()
    keys = list(model.state_dict())
    assert list(bn_ext.convert(model).state_dict()) == keys


def test_instance_forward_is_kept(device: str) -> None:
    """A forward set on the object, as offloading tools do, still wins."""
    module = nn.BatchNorm2d(3)
    module.forward = lambda input: input * 0 + 7
    assert bn_ext.convert(module)(torch.randn(2, 3, 4, 4)).eq(7).all()
