"""Exported graphs hold standard operators only, and compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bn_ext


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
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bn_ext.functional.batch_norm(x, None, None, training=True)

    program = torch.export.export(Call(), (torch.randn(2, 3, 4, 4, device=device),))
    assert not [n for n in program.graph.nodes if "bn_ext" in str(n.target)]


def test_export_leaves_the_module_as_it_was(device: str) -> None:
    model = network(device)
    torch.export.export(model, (torch.randn(2, 3, 6, 6, device=device),))
    assert type(model[1]) is bn_ext.BatchNorm2d
    assert model[1].num_batches_tracked.item() == 0
