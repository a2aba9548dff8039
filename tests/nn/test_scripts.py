"""TorchScript and torch.fx: scripted, traced and symbolically traced models compute what the model computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from modules import CHANNELS, NAMES, PREPARATIONS, SHAPES, assert_same_state, ours
from networks import NETWORKS, assert_same_training
from torch import nn

import bn_ext
from bn_ext import activation as activations

OPTIONS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False, "momentum": None}]


def network(device: str) -> nn.Module:
    block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), block, nn.Flatten(2), nn.BatchNorm1d(4))
    return bn_ext.convert(model).to(device)


def assert_same_steps(one: nn.Module, other: nn.Module, shape: tuple[int, ...], device: str) -> None:
    """Two training steps and an evaluation, bit by bit."""
    for training in (True, True, False):
        input = torch.randn(shape, device=device, requires_grad=True)
        outputs = [m.train(training)(input) for m in (one, other)]
        assert torch.equal(*outputs)
        dy = torch.randn_like(outputs[0])
        assert torch.equal(*(torch.autograd.grad(y, input, dy)[0] for y in outputs))
    assert_same_state(one, other)


# ---------------------------------------------------------------------------------------------- TorchScript


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scripted_module(name: str, options: dict, device: str) -> None:
    module = ours(name)(CHANNELS, device=device, **options)
    assert_same_steps(torch.jit.script(copy.deepcopy(module)), module, SHAPES[name][0], device)


def test_scripted_network(device: str) -> None:
    """Saved and loaded, on our kernels."""
    model = network(device)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(copy.deepcopy(model)), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    assert "bn_ext::batch_norm" in str(scripted.inlined_graph)
    assert_same_steps(scripted, model, (2, 3, 6, 6), device)


def test_frozen_script(device: str) -> None:
    model = network(device).eval()
    input = torch.randn(2, 3, 6, 6, device=device)
    assert torch.equal(torch.jit.freeze(torch.jit.script(model))(input), model(input))


def test_scripted_function(device: str) -> None:
    input = torch.randn(2, 3, 4, 4, device=device)
    scripted = torch.jit.script(bn_ext.functional.batch_norm)
    expected = bn_ext.functional.batch_norm(input, None, None, training=True)
    assert torch.equal(scripted(input, None, None, training=True), expected)


def test_script_refuses_what_the_module_refuses() -> None:
    with pytest.raises(torch.jit.Error, match="expected 4D input"):
        torch.jit.script(bn_ext.BatchNorm2d(3))(torch.randn(2, 3, 4))


@pytest.mark.parametrize("training", [True, False])
def test_traced_network(training: bool, device: str) -> None:
    """As torch's, a trace stays in the mode in which it was made; making it is a call."""
    model = network(device).train(training)
    input = torch.randn(2, 3, 6, 6, device=device)
    traced = torch.jit.trace(copy.deepcopy(model), (input,), check_trace=False)
    model(input)
    assert torch.equal(traced(input), model(input))
    assert_same_state(traced, model)


@pytest.mark.parametrize("activation", activations.NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_traced_residual_and_activation(activation: str, training: bool, device: str) -> None:
    module = bn_ext.BatchNormAct2d(4, activation=activation, device=device).train(training)
    tensors = torch.randn(4, 2, 4, 6, 6, device=device)
    traced = torch.jit.trace(copy.deepcopy(module), (tensors[0], tensors[1]), check_trace=False)
    module(tensors[0], tensors[1])
    results = []
    for one in (traced, module):
        x, residual = tensors[2:].clone().requires_grad_()
        output = one(x, residual)
        results.append([output, *torch.autograd.grad(output.square().sum(), (x, residual, *one.parameters()))])
    torch.testing.assert_close(*results)
    assert_same_state(traced, module)


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_traced_whole_network(name: str, training: bool, prepare: Callable, device: str) -> None:
    network = NETWORKS[name]
    theirs = network.make().to(device, torch.float64).train(training)
    mine = prepare(copy.deepcopy(theirs))
    first, second = (network.input(batch, device=device, dtype=torch.float64) for batch in (4, 3))
    traced = torch.jit.trace(mine, (first,), check_trace=False)
    theirs(first)
    assert_same_training(traced, theirs, [second])


class Called(nn.Module):
    """A module with a call of its own."""

    def __init__(self, module: nn.Module, call: Callable) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.call(self.module, x, other)


def adapted() -> nn.Module:
    module = bn_ext.BatchNorm1d(4)
    bn_ext.train.adapt(module, 0.5)
    return module


TRACED: dict[str, Callable[[], nn.Module]] = {
    "mask": lambda: Called(bn_ext.BatchNorm1d(4), lambda bn, x, lengths: bn(x, mask=lengths.unsqueeze(1) > x[:, 0])),
    "lengths": lambda: Called(bn_ext.BatchNorm1d(4), lambda bn, x, lengths: bn(x, lengths=lengths)),
    "ghost": lambda: Called(bn_ext.nn.GhostBatchNorm1d(4, 2), lambda bn, x, _: bn(x)),
    "shared": lambda: Called(bn_ext.nn.SharedBatchNorm1d(4, 2), lambda bn, x, _: bn(x)),
    "last": lambda: Called(bn_ext.nn.BatchNormLast(4), lambda bn, x, _: bn(x.mT)),
    "domain": lambda: Called(bn_ext.nn.DomainBatchNorm1d(4, 3), lambda bn, x, lengths: bn(x, lengths % 3)),
    "number": lambda: Called(bn_ext.nn.DomainBatchNorm1d(4, 3), lambda bn, x, _: bn(x, 1)),
    "adapted": lambda: Called(adapted(), lambda bn, x, _: bn(x)),
}


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRACED)
def test_traces_hold_for_other_sizes(name: str, training: bool, device: str) -> None:
    """And say so: nothing of the example's sizes is kept."""
    module = TRACED[name]().to(device).train(training)
    example, lengths = torch.randn(6, 4, 5, device=device), torch.tensor([1, 5, 2, 3, 4, 0], device=device)
    traced = torch.jit.trace(copy.deepcopy(module), (example, lengths), check_trace=False)
    module(example, lengths)
    x, lengths = torch.randn(9, 4, 7, device=device), torch.arange(9, device=device) % 8
    torch.testing.assert_close(traced(x, lengths), module(x, lengths))
    torch.testing.assert_close(traced.state_dict(), module.state_dict())


def test_a_trace_of_ghosts_noise(device: str) -> None:
    """Keeps the sizes of its example, and warns: a script does not."""
    module = bn_ext.nn.GhostBatchNorm1d(4, 2, noise=True).to(device)
    with pytest.warns(torch.jit.TracerWarning):
        torch.jit.trace(copy.deepcopy(module), (torch.randn(6, 4, 5, device=device),), check_trace=False)


# ---------------------------------------------------------------------------------------------- torch.fx


def test_symbolic_trace(device: str) -> None:
    """Our modules are leaves, as torch's, so that the graph follows their mode and passes find them."""
    model = network(device)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    by_torch = torch.fx.symbolic_trace(bn_ext.revert(copy.deepcopy(model)))
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in by_torch.graph.nodes]
    assert type(traced.get_submodule("1.0")) is bn_ext.BatchNorm2d
    assert_same_steps(traced, model, (2, 3, 6, 6), device)


def test_symbolic_trace_of_a_residual(device: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), bn_ext.BatchNormAct2d(3, activation="relu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x), residual=x)

    model = Block().to(device)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["conv", "norm"]
    assert_same_steps(traced, model, (2, 3, 6, 6), device)


def test_symbolic_trace_of_the_function(device: str) -> None:
    traced = torch.fx.symbolic_trace(lambda x: bn_ext.functional.batch_norm(x, None, None, training=True))
    input = torch.randn(2, 3, 4, 4, device=device)
    assert torch.equal(traced(input), bn_ext.functional.batch_norm(input, None, None, training=True))
