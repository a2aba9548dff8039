"""bn_ext.fuse with inputs: captures and checks at once, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import Model, fused_with
from networks import NETWORKS
from torch import Tensor, nn

import bn_ext
from bn_ext.graph import fusions
from bn_ext.graph.fusion import fused, rewrite
from bn_ext.graph.fusion.installed import installed
from bn_ext.graph.fusion.spelling import Activation, activation_of


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


@torch._dynamo.disable
def draw() -> float:
    return random.random() + np.random.rand()


class Random(nn.Module):
    """Draws, counts and remembers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Model(lambda m, y, r: F.dropout(F.relu(y + r), 0.5, m.training))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, Tensor]:
        with torch.no_grad():
            self.seen += 1
            self.scale *= 2
        self.last = x.mean().detach().view(1)
        x += shift + 0 * draw()
        return {"y": self.net(x), "z": torch.rand(2) + self.scale}


def test_nothing_is_left_behind() -> None:
    model = Random()
    model.net.bn.eval()
    model.net.conv.weight.grad = torch.ones_like(model.net.conv.weight)
    before = copy.deepcopy(model.state_dict())
    objects = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    flags = [module.training for module in model.modules()]
    x = torch.randn(2, 3, 5, 5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    given = x.clone()
    assert bn_ext.fuse(model, x, shift=1.0) is model
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2][1])
    assert torch.equal(x, given)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == objects
    assert [module.training for module in model.modules()] == flags
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["net.conv.weight"]
    assert model.net.conv.weight.grad.eq(1).all()
    assert fused_with(model) == {"net.bn": ("add", "relu")}


def captures() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("modes", [("train", "eval"), ("eval",), ("train",), ()])
def test_modes_are_captured_now(modes: tuple[str, ...]) -> None:
    torch._dynamo.utils.counters.clear()
    x = torch.randn(2, 3, 5, 5)
    model = bn_ext.fuse(Model(lambda m, y, r: F.relu(y)), x, modes=modes)
    assert captures() == len(modes)
    if "train" in modes:
        model.train()(x)
    if "eval" in modes:
        with torch.no_grad():
            model.eval()(x)
    assert captures() == len(modes)


def test_unknown_modes() -> None:
    for modes, shown in ((("test",), r"\('test',\)"), ("train", "'train'")):
        with pytest.raises(ValueError, match=f"a sequence of 'train' and 'eval', got {shown}$"):
            bn_ext.fuse(Model(), torch.randn(2, 3, 5, 5), modes=modes)


def test_inputs_may_have_any_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, model: int) -> Tensor:
            return F.relu(self.bn(x)) * model

    model = bn_ext.fuse(Named(), torch.randn(2, 3, 4, 4), model=3)
    assert fused_with(model) == {"bn": ("relu",)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["resnet50", "efficientnet", "densenet"])
def test_rounding_is_no_difference(name: str, dtype: torch.dtype) -> None:
    network = NETWORKS[name]
    model = network.make().to(dtype)
    bn_ext.fuse(model, network.input(dtype=dtype))
    assert installed(model) is not None


def test_rounding_may_be_made_larger_by_the_model() -> None:
    model = Model(lambda m, y, r: torch.sin(F.gelu(y + r) * 1e6))
    bn_ext.fuse(model, torch.randn(2, 3, 5, 5))
    assert fused_with(model) == {"bn": ("add", "gelu")}


def mistaken(node: torch.fx.Node) -> Activation | None:
    found = activation_of(node)
    path = list(node.meta["nn_module_stack"].values())[-1][0]
    return found._replace(name="relu6") if found is not None and path.endswith("stages.1.bn2") else found


def off_by_little(node: torch.fx.Node) -> Activation | None:
    found = activation_of(node)
    return found and Activation("leaky_relu", 1e-3, found.calls)


def test_a_difference_names_the_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["resnet18"]
    model = network.make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 5)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(rewrite, "activation_of", mistaken)
    message = r"ResNet, where stages.1.bn2 is fused, gives other outputs in mode 'eval': output 0 is off by"
    with pytest.raises(AssertionError, match=message):
        bn_ext.fuse(model, network.input(), modes=("eval",))
    assert installed(model) is None
    assert fusions(model) == []
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    monkeypatch.undo()
    bn_ext.fuse(model, network.input())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_small_differences_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "activation_of", off_by_little)
    with pytest.raises(AssertionError, match="Model, where bn is fused, gives other outputs in mode 'train'"):
        bn_ext.fuse(Model(lambda m, y, r: F.relu(y)).to(dtype), torch.randn(2, 3, 5, 5, dtype=dtype))


def test_without_inputs_nothing_is_captured_yet() -> None:
    torch._dynamo.utils.counters.clear()
    model = bn_ext.fuse(Model(lambda m, y, r: F.relu(y)))
    assert captures() == 0
    assert fusions(model)[0].reason == "no call of the fused model is captured yet: call the model once"
    model(torch.randn(2, 3, 5, 5))
    assert captures() == 1


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    bn_ext.fuse(model, torch.randn(2, 3, 5, 5))
    assert fused_with(model) == {"1": ("relu",)}
    assert model[1].num_batches_tracked == 0
    assert model[1].running_mean.eq(0).all() and model[1].running_var.eq(1).all()


@pytest.mark.parametrize("given", [False, True])
def test_an_error_of_ours_is_told(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By fuse with inputs as it is, else in the report: the call runs as it is."""

    def broken(*_: object) -> list:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(fused, "rewrite", broken)
    model = Model(lambda m, y, r: F.relu(y))
    x = torch.randn(2, 3, 5, 5)
    if given:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            bn_ext.fuse(model, x)
        assert installed(model) is None
    else:
        expected = bn_ext.convert(copy.deepcopy(model))(x)
        torch.testing.assert_close(bn_ext.fuse(model)(x), expected)
        ((name, found, reason, on_kernels),) = fusions(model)
        assert (name, found, on_kernels) == ("bn", (), None)
        assert reason == "a graph could not be rewritten: ZeroDivisionError('a bug')"


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            raise KeyError("too many")
        return F.relu(self.bn(x))


def test_an_error_of_the_model_leaves_it_unfused() -> None:
    model = Refusing()
    with pytest.raises(KeyError, match="too many"):
        bn_ext.fuse(model, torch.randn(2, 3, 4, 4))
    assert installed(model) is None


@pytest.mark.parametrize("training", [True, False])
def test_a_backward_to_come_is_not_disturbed(training: bool) -> None:
    model = Model(lambda m, y, r: F.relu(y + r)).train(training)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    output = model(x)
    bn_ext.fuse(model, x)
    output.sum().backward()


class Registering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("mean", x.mean())
        self.register_parameter("shift", nn.Parameter(torch.ones(1)))
        return F.relu(self.bn(x)) + self.mean


def test_what_a_forward_registers_does_not_stay() -> None:
    model = Registering()
    names = list(model.state_dict())
    bn_ext.fuse(model, torch.randn(2, 3, 4, 4))
    assert list(model.state_dict()) == names
