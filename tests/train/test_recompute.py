"""Outputs that the backward makes again: the same bits, in less memory, or an error."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from networks import NETWORKS, Bottleneck, ResNet
from recomputed import Net, assert_same, every_way, example, fused, kept, pair, step
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

import bn_ext
from bn_ext.train import keep_outputs, recompute_outputs, recording

# ---------------------------------------------------------------------------------------------- bits and bytes


@pytest.mark.parametrize(
    ("name", "prepare"),
    [*((name, bn_ext.convert) for name in NETWORKS), *((name, bn_ext.fuse) for name in ("efficientnet", "unet3d"))],
)
def test_networks(name: str, prepare: Callable, device: str) -> None:
    network = NETWORKS[name]
    plain = network.make().to(device)
    again = recompute_outputs(prepare(copy.deepcopy(plain)))
    plain = prepare(plain)
    x = network.input(device=device)
    for _ in range(2):
        assert_same(step(plain, x), step(again, x))


@every_way
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_layouts_and_types(activation: str, make: Callable) -> None:
    plain, again = pair(make, activation=activation)
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (None, torch.bfloat16):
            x = example().to(memory_format=layout)

            def around(dtype: torch.dtype | None = dtype) -> torch.autocast:
                return torch.autocast("cpu", dtype, enabled=dtype is not None)

            assert_same(step(plain, x, around=around), step(again, x, around=around))


def test_parameters_in_the_type_of_autocast() -> None:
    """Autocast's copies of them are made again: as they are, as a view, and for two calls at a time."""
    plain = nn.Sequential(nn.Conv2d(2, 64, 3), bn_ext.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 64))
    again = recompute_outputs(copy.deepcopy(plain))
    inputs = torch.randn(2, 2, 2, 3, 3).unbind()

    def around() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    sizes = [kept(model, *inputs, around=around) for model in (plain, again)]
    assert sizes[0] - sizes[1] >= 2 * (plain[0].weight.numel() + plain[3].weight.numel())
    assert_same(step(plain, *inputs, around=around), step(again, *inputs, around=around))
    with around():
        output = again(inputs[0])
    with torch.no_grad():
        again[3].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"the parameter 3\.weight was modified by an inplace operation after"):
        output.sum().backward()


def test_memory(device: str) -> None:
    """Of each layer the input of the batch norm, and nothing else of that size."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(5)]
    model = bn_ext.fuse(nn.Sequential(*layers, nn.Conv2d(8, 1, 1))).to(device)
    x = torch.randn(4, 8, 32, 32, device=device)
    before = kept(model, x)
    after = kept(recompute_outputs(model), x)
    assert round(before / x.nbytes) == 10
    assert round(after / x.nbytes) == 5
    assert kept(keep_outputs(model), x) == before


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooled_outputs(layout: torch.memory_format) -> None:
    """A pool's result is read from the output again, at the places that the pool keeps."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers).to(memory_format=layout)
    plain, again = bn_ext.fuse(copy.deepcopy(model)), recompute_outputs(bn_ext.fuse(model))
    x = example(17).to(memory_format=layout)
    assert_same(step(plain, x), step(again, x))
    assert kept(plain, x) - kept(again, x) == (15 * 15 + 8 * 8) * 4 * 8 * 4


@pytest.mark.parametrize("in_place", [True, False])
def test_relu_of_its_own(in_place: bool) -> None:
    """In a converted model torch's ReLU is another call, and its result the tensor that is saved."""
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(in_place)) for _ in range(5)]
    plain = bn_ext.convert(nn.Sequential(*layers, nn.Conv2d(8, 1, 1)))
    again, x = recompute_outputs(copy.deepcopy(plain)), torch.randn(4, 8, 32, 32)
    assert_same(step(plain, x), step(again, x))
    assert round(kept(plain, x) / x.nbytes) == 10
    assert round(kept(again, x) / x.nbytes) == 5


@pytest.mark.parametrize(
    "change",
    [lambda y: y.mul_(2).relu_(), lambda y: y.add(1).relu_(), lambda y: y[1:].relu_()],
)
def test_other_calls_before_a_relu(change: Callable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.last = bn_ext.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            z = change(y)
            return self.last(z).sum() + self.last(y).sum()

    model, x = Model(), torch.randn(4, 4, 3, 3)
    plain = copy.deepcopy(model)
    assert_same(step(plain, x), step(recompute_outputs(model), x))


def test_chains(device: str) -> None:
    """A block's output is made of the one before; without chains that one is kept."""
    model = bn_ext.fuse(ResNet(Bottleneck, (5,), 16, 5)).to(device)
    x = example(64, device=device)
    sizes = [kept(recompute_outputs(model, chains=chains), x) for chains in (True, False)]
    output = 4 * 64 * 16 * 16 * 4
    assert sizes[1] - sizes[0] >= 2 * output
    assert sizes[1] < 0.8 * kept(keep_outputs(model), x)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[TensorWeakRef]:
    """Every output that is made again, as long as it lives."""
    found: list[TensorWeakRef] = []
    again = recording._again

    def noted(*args) -> Tensor:
        output = again(*args)
        found.append(TensorWeakRef(output))
        return output

    monkeypatch.setattr(recording, "_again", noted)
    return found


def alive(made: list[TensorWeakRef]) -> int:
    return sum(one() is not None for one in made)


def test_each_is_made_once_a_backward_and_freed(made: list[TensorWeakRef]) -> None:
    layers = [nn.Sequential(nn.Conv2d(4, 4, 1), bn_ext.BatchNormAct2d(4)) for _ in range(6)]
    model = recompute_outputs(bn_ext.convert(nn.Sequential(*layers, Branches())))
    most = []
    for layer in layers[1:]:
        layer[0].register_full_backward_hook(lambda *_: most.append(alive(made)))
    loss = sum(output.sum() for output in model(torch.randn(2, 4, 5, 5)))
    for round in (1, 2):
        loss.backward(retain_graph=True)
        assert len(made) == 7 * round
        assert alive(made) == 0
    assert max(most) == 0


@every_way
def test_everything_is_freed_with_the_graph(make: Callable) -> None:
    """By reference counts alone: no cycle waits for the collector."""
    _, model = pair(make)
    gc.collect()
    gc.disable()
    try:
        before = shared()  # of other tests
        outputs = [model(example()) for _ in range(2)]
        assert shared() > before
        del outputs
        assert shared() == before
        step(model, example())
        assert shared() == before
    finally:
        gc.enable()


def shared() -> int:
    return sum(issubclass(type(one), recording._Shared) for one in gc.get_objects())


def test_what_nobody_asks_for_is_freed_with_the_backward(made: list[TensorWeakRef]) -> None:
    model = recompute_outputs(bn_ext.convert(Branches()))
    one, _ = model(torch.randn(2, 4, 3, 3))
    one.sum().backward(inputs=[model.one.weight])
    assert len(made) == 1
    assert alive(made) == 0


class Branches(nn.Module):
    """Two readers of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.one, self.other = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(x)
        return self.one(y), self.other(y)


@pytest.mark.parametrize("freeze", ["parameters", "evaluation", "all"])
@every_way
def test_frozen_layers_keep_no_more(freeze: str, make: Callable) -> None:
    plain, again = pair(make)
    for model in (plain, again):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(freeze == "evaluation").train(freeze == "parameters")
        if freeze == "all":
            model.first.requires_grad_(False)
    x = example(16)
    gradients = [[g for g in step(model, x) if g is not None] for model in (plain, again)]
    assert_same(*gradients)
    assert kept(again, x) <= kept(plain, x)


# ---------------------------------------------------------------------------------------------- backwards


@every_way
def test_several_forwards_and_accumulation(make: Callable) -> None:
    plain, again = pair(make)
    xs = [example() for _ in range(3)]
    assert_same(step(plain, *xs), step(again, *xs))
    for model in (plain, again):
        for seed, x in enumerate(xs):
            torch.manual_seed(seed)
            model(x).square().sum().backward()
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in again.parameters()])


@every_way
def test_second_backward(make: Callable) -> None:
    results = []
    for model in pair(make):
        torch.manual_seed(1)
        loss = model(torch.linspace(-1, 1, 768).view(4, 3, 8, 8)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append([p.grad for p in model.parameters()])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert_same(*results)


def test_backwards_of_parts() -> None:
    """The batch norm's own node is done, and its tensors freed, before a reader of its output is."""
    gradients = []
    for model in (bn_ext.convert(Branches()), recompute_outputs(bn_ext.convert(Branches()))):
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + i)
        one, other = model(torch.linspace(-1, 1, 72).view(2, 4, 3, 3))
        one.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        gradients[-1] += torch.autograd.grad(other.square().sum(), model.other.weight)
    assert_same(*gradients)


@every_way
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_double_backward(activation: str, make: Callable) -> None:
    model = recompute_outputs(make(activation=activation)).double()
    model.drop.p = 0.0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"second.weight": weight}, (x,)).square().mean()

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = model.second.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradgradcheck(loss, (x, weight), fast_mode=True)


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradient_penalty(create_graph: bool) -> None:
    results = []
    for model in pair(fused):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 768).view(4, 3, 8, 8).requires_grad_()
        output = model(x)
        (dx,) = torch.autograd.grad(output.sum(), x, create_graph=create_graph, retain_graph=True)
        (output.sum() + dx.square().sum()).backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert_same(*results)


# ---------------------------------------------------------------------------------------------- what is written to


class Written(nn.Module):
    """What its batch norm reads is written to, unless nothing is named."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(4, 4, 1), bn_ext.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, residual: Tensor, name: str, kept: bool = True) -> Tensor:
        residual = residual * 2
        input = self.conv(residual if kept else residual.detach())
        output = self.last(self.bn(input, residual, "relu"))
        with torch.no_grad():
            {"input": input, "residual": residual, "weight": self.bn.weight, "bias": self.bn.bias}[name].mul_(2)
        return output


@pytest.mark.parametrize("name", ["input", "residual", "weight", "bias"])
def test_what_was_written_to_is_named(name: str) -> None:
    output = recompute_outputs(Written())(torch.randn(2, 4, 3, 3, requires_grad=True), name)
    with pytest.raises(
        RuntimeError, match=f"the {name} of the batch norm bn was modified by an inplace operation after"
    ):
        output.sum().backward()


def test_a_residual_that_nobody_keeps_may_be_written_to() -> None:
    """The output is kept then. The convolution saves a detached alias, which is another tensor."""
    model = Written()
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    output = recompute_outputs(model)(x, "residual", kept=False)
    weight = torch.autograd.grad(output.sum(), model.last.weight)
    output = keep_outputs(model)(x, "residual", kept=False)
    assert_same([*weight], [*torch.autograd.grad(output.sum(), model.last.weight)])


def test_other_tensors_that_were_written_to_are_errors() -> None:
    model = recompute_outputs(Net(ours=True))
    output = model(example())
    with torch.no_grad():
        model.last.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_output_that_is_written_to_is_kept() -> None:
    """torch's ReLU in place makes another tensor of it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.last = bn_ext.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bn(x).relu_())

    model, x = Model(), torch.randn(2, 4, 3, 3)
    plain = copy.deepcopy(model)
    assert_same(step(plain, x), step(recompute_outputs(model), x))


@pytest.mark.parametrize("read", [lambda y: y.flatten(1), lambda y: y[:, 1:].flatten(1), lambda y: y.mT.flatten(1)])
def test_views_of_outputs(read: Callable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = bn_ext.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = read(self.bn(x, activation="relu"))
            return y * y.flip(1)

    model, x = Model(), torch.randn(4, 4, 6, 6)
    plain = copy.deepcopy(model)
    assert_same(step(plain, x), step(recompute_outputs(model), x))
