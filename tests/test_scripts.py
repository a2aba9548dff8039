"""TorchScript and torch.fx: scripted, traced and symbolically traced models compute what the model computes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from modules import CHANNELS, NAMES, SHAPES, assert_same_state, ours
from torch import nn

import bn_ext

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


# ---------------------------------------------------------------------------------------------- torch.fx


def test_symbolic_trace(device: str) -> None:
    """Our modules are leaves, as torch's, so that the graph follows their mode and passes find them."""
    model = network(device)
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    by_torch = torch.fx.symbolic_trace(bn_ext.revert(copy.deepcopy(model)))
    assert [(n.op, n.target) for n in traced.graph.nodes] == [(n.op, n.target) for n in by_torch.graph.nodes]
    assert type(traced.get_submodule("1.0")) is bn_ext.BatchNorm2d
    assert_same_steps(traced, model, (2, 3, 6, 6), device)


def test_symbolic_trace_of_the_function(device: str) -> None:
    traced = torch.fx.symbolic_trace(lambda x: bn_ext.functional.batch_norm(x, None, None, training=True))
    input = torch.randn(2, 3, 4, 4, device=device)
    assert torch.equal(traced(input), bn_ext.functional.batch_norm(input, None, None, training=True))
