"""Exported graphs hold standard operators only, and compute the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from modules import PREPARATIONS
from networks import NETWORKS
from torch import Tensor, nn
from torch.export import Dim

import bn_ext
from bn_ext import activation as activations


def network(device: str) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), bn_ext.BatchNorm2d(4), nn.ReLU(), nn.Flatten(2), bn_ext.BatchNorm1d(4))
    return model.to(device)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export(strict: bool, training: bool, device: str) -> None:
    model = network(device).train(training)
    input = torch.randn(2, 3, 6, 6, device=device)
    program = torch.export.export(model, (input,), strict=strict)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any("batch_norm" in name for name in called)
    assert not [name for name in called if not name.startswith("aten.")]
    decomposed = {str(n.target) for n in program.run_decompositions().graph.nodes if n.op == "call_function"}
    assert not [name for name in decomposed if "bn_ext" in name]
    if not training:
        torch.testing.assert_close(program.module()(input), model(input))


def test_export_of_the_function(device: str) -> None:
    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bn_ext.functional.batch_norm(x, None, None, training=True)

    program = torch.export.export(Call(), (torch.randn(2, 3, 4, 4, device=device),))
    assert not [n for n in program.graph.nodes if "bn_ext" in str(n.target)]


def test_export_leaves_the_module_as_it_was(device: str) -> None:
    model = network(device)
    torch.export.export(model, (torch.randn(2, 3, 6, 6, device=device),))
    assert type(model[1]) is bn_ext.BatchNorm2d
    assert model[1].num_batches_tracked.item() == 0


# ---------------------------------------------------------------------------------------------- whole networks


class Activations(nn.Module):
    """A residual and each activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(bn_ext.BatchNormAct2d(4, activation=name) for name in activations.NAMES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([norm(x, x.flip(0)) for norm in self.norms])


def trained(model: nn.Module, input: Tensor) -> nn.Module:
    """``model``, once the statistics and parameters of its batch norms are not what they begin as, to evaluate."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    model(input)
    return model.eval()


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, prepare: Callable, device: str) -> None:
    """Standard operators alone, those of torch's modules if nothing is fused, for a batch of any size."""
    network = NETWORKS[name]
    theirs = network.make().to(device)
    trained(theirs, network.input(device=device))
    mine = prepare(copy.deepcopy(theirs))
    input = network.input(device=device)
    program = torch.export.export(mine, (input,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert all(operator.startswith("aten.") for operator in operators(program))
    if prepare is bn_ext.convert:
        expected = torch.export.export(theirs, (input,), dynamic_shapes=({0: Dim.DYNAMIC},))
        assert operators(program) == operators(expected)
    larger = network.input(7, device=device)
    torch.testing.assert_close(program.module()(larger), theirs(larger))


def test_residual_and_activations(device: str) -> None:
    input = torch.randn(3, 4, 5, 5, device=device)
    model = trained(Activations().to(device), input)
    program = torch.export.export(model, (input,))
    assert all(operator.startswith("aten.") for operator in operators(program))
    torch.testing.assert_close(program.module()(input), model(input))


# ---------------------------------------------------------------------------------------------- ONNX


def by_onnxruntime(model: nn.Module, input: Tensor, dynamo: bool) -> Callable[[Tensor], Tensor]:
    """``model`` as exported with one ``input``, to be run with batches of any size."""
    onnx = pytest.importorskip("onnx", reason="no onnx to export to")
    onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime to run what is exported")
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (input,), dynamo=True, dynamic_shapes=({0: Dim.DYNAMIC},), verbose=False).save(file)
    else:
        names = {"input_names": ["input"], "output_names": ["output"], "dynamic_axes": {"input": {0: "batch"}}}
        torch.onnx.export(model, (input,), file, dynamo=False, **names)
    assert {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node} == {""}, "of the standard"
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return lambda x: torch.from_numpy(np.asarray(session.run(None, {name: x.numpy()})[0]))


def assert_onnx_runs(model: nn.Module, input: Tensor, larger: Tensor, dynamo: bool) -> None:
    run = by_onnxruntime(trained(model, input), input, dynamo)
    torch.testing.assert_close(run(larger), model(larger), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prepare", PREPARATIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_network_in_onnx(name: str, prepare: Callable) -> None:
    """By the TorchScript exporter, which takes a tenth of the other's time."""
    network = NETWORKS[name]
    assert_onnx_runs(prepare(network.make()), network.input(), network.input(7), dynamo=False)


@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_network_in_onnx_by_dynamo(prepare: Callable) -> None:
    network = NETWORKS["preact_resnet"]
    assert_onnx_runs(prepare(network.make()), network.input(), network.input(7), dynamo=True)


@pytest.mark.parametrize("dynamo", [True, False])
def test_residual_and_activations_in_onnx(dynamo: bool) -> None:
    assert_onnx_runs(Activations(), torch.randn(3, 4, 5, 5), torch.randn(5, 4, 5, 5), dynamo)
