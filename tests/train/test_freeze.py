"""freeze and unfreeze: batch norms that stay in evaluation when the model trains."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helped import WAYS, Several, assert_same, images, state
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

import bn_ext
from bn_ext.train import freeze, unfreeze


def network() -> nn.Module:
    """Trained for a batch, so that its statistics are no longer 0 and 1."""
    model = Several(functions=False)
    model.drop.p = 0.0
    model(images())
    return model


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "BatchNorm" in type(module).__name__]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def train(model: nn.Module, call=None) -> None:
    """Some steps, with weight decay, which moves whatever has a gradient, if only of 0."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        (model if call is None else call)(images()).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_moves(way: str) -> None:
    torch._dynamo.reset()
    model = network()
    train(model)
    before = state(model)
    call = WAYS[way](model)
    call(images())  # captured in training first
    model.load_state_dict(before)
    freeze(model)
    train(model, call)
    assert_same(
        {k: v for k, v in state(model).items() if "conv" not in k}, {k: v for k, v in before.items() if "conv" not in k}
    )
    assert not torch.equal(model.conv.weight, before["conv.weight"])
    x = images()
    torch.testing.assert_close(call(x), bn_ext.graph.unfuse(copy.deepcopy(model)).eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("through", [copy.deepcopy, pickled, torch.jit.script])
def test_copies_stay_frozen_and_thaw(through) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), bn_ext.BatchNormAct2d(3), nn.Conv2d(3, 3, 1))
    before = state(model)
    parameters = list(model.parameters())
    freeze(model.train())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    copied = through(model)
    copied.train()
    copied(images()).sum().backward()
    assert_same(state(copied), before)
    assert [name for name, p in copied.named_parameters() if p.grad is not None] == ["2.weight", "2.bias"]
    if through is not torch.jit.script:
        unfreeze(copied)
        copied(images()).sum().backward()
        assert copied[0].num_batches_tracked == copied[1].num_batches_tracked == 1
        assert all(p.grad is not None for p in copied.parameters())
        assert vars(copied[0]).keys() == vars(bn_ext.BatchNorm2d(3)).keys()


def test_parameters_train_unless_frozen() -> None:
    model = network()
    record = freeze(model, affine=False)
    before = state(model)
    train(model)
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, _ in model.named_parameters()}
    assert [changed for *_, changed in record.rows] == ["statistics stay"] * 3
    record.undo()
    train(model)
    assert model.theirs.num_batches_tracked == 3


def test_unfreeze_gives_back_what_there_was() -> None:
    """The mode asked for last, and the requirements of gradients; statistics freeze and thaw by layers, too."""
    model = network()
    model.ours.bias.requires_grad_(False)
    freeze(model)
    assert not any(m.training for m in norms(model))
    assert freeze(model).rows[1].changed == "statistics, weight and bias stay"
    model.eval()
    record = unfreeze(model)
    assert not any(m.training for m in norms(model))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["ours.bias"]
    assert record.rows[1].changed == "statistics and weight train"
    record.undo()
    assert all(m.frozen for m in norms(model))
    unfreeze(model.train())
    assert all(m.training for m in norms(model))
    assert unfreeze(model).rows[0].changed == "was not frozen"


def test_parametrized_and_without_parameters_or_statistics() -> None:
    class Halved(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w / 2

    model = nn.Sequential(
        nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False)
    )
    parametrize.register_parametrization(model[0], "weight", Halved())
    rows = freeze(model).rows
    assert [row.changed for row in rows] == [
        "statistics, bias and weight.original stay",
        "statistics stay",
        "weight and bias stay",
    ]
    assert not any(p.requires_grad for p in model.parameters())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_other_tools() -> None:
    """update_bn would reset the statistics and never fill them; torch's batch norms would thaw."""
    model = network()
    freeze(model)
    before = state(model)
    update_bn([images()], model)
    assert_same(state(model), before)
    with pytest.raises(ValueError, match="theirs is frozen"):
        bn_ext.revert(model)
    assert "frozen" in repr(model.ours)
    assert "frozen" in repr(model.activated)
    unfreeze(model)
    assert "frozen" not in repr(model)
    assert type(bn_ext.revert(model).theirs) is nn.BatchNorm2d
    with pytest.warns(UserWarning, match="1 SyncBatchNorm"):
        record = freeze(nn.Sequential(nn.SyncBatchNorm(3)))
    assert record.rows[0].changed == "left as it is: bn_ext.convert does not take it"


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_frozen_layer_keeps_nothing_of_the_inputs_size(activation: str | None) -> None:
    layer = bn_ext.BatchNormAct2d(4, activation=activation)
    freeze(layer)
    layer.train()
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sum(t.nbytes for t in kept) <= 4 * 5 * 8 + (x.numel() // 8 if activation else 0)
