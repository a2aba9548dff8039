"""bn_ext.fold folds exported programs."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from folding import Custom, assert_same_outputs, image, outcomes, trained
from torch import nn

import bn_ext
from bn_ext.graph import folds


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (image(dtype=torch.double),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("last", [False, True], ids=["inside", "last"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_exported_program(bias: bool, last: bool) -> None:
    layers = nn.Conv2d(6, 6, 3, bias=bias), nn.Dropout(), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    model = trained(nn.Sequential(*layers[: 3 if last else 5])).double()
    program = exported(model)
    before, names = str(program), list(program.state_dict)
    folded = bn_ext.fold(program, image(dtype=torch.double))
    assert type(folded) is torch.export.ExportedProgram
    assert outcomes(folded) == ({"2": "0"} if last else {"2": "0", "4": "3"})
    assert set(folded.state_dict) == {f"{i}.{n}" for i in ((0,) if last else (0, 3)) for n in ("weight", "bias")}
    assert (str(program), list(program.state_dict)) == (before, names)
    assert folded.range_constraints == program.range_constraints
    file = io.BytesIO()
    torch.export.save(folded, file)
    file.seek(0)
    for same in (folded, torch.export.load(file), folded.run_decompositions()):
        assert_same_outputs(same.module(), model, torch.randn(3, 6, 5, 5, dtype=torch.double))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, x: m.norm(y := m.conv(x)) + y, "used elsewhere"),
        (lambda m, x: m.norm(x), "follows x"),
        (lambda m, x: m.norm(F.conv2d(x, m.conv.weight * 2)), "is computed"),
        (lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean(), "shares parameters"),
        (lambda m, x: m.norm(m.conv(x)[0][None]), "follows"),
        (lambda m, x: (m.norm(m.conv(x)), m.norm.running_mean.add_(1))[0], "used elsewhere"),
        (lambda m, x: (m.norm(m.conv(x)), m.norm.running_var.zero_())[0], "used elsewhere"),
        (lambda m, x: m.norm(m.conv(x)) * m.norm.weight.mean(), "used elsewhere"),
    ],
)
def test_left_in_an_exported_program(call: Callable[..., Any], reason: str) -> None:
    model = trained(Custom(call)).double()
    folded = bn_ext.fold(exported(copy.deepcopy(model)))
    assert outcomes(folded) == {"norm": ""}
    assert reason in str(folds(folded)[0])
    assert_same_outputs(folded.module(), model, image(dtype=torch.double), tolerance=0)


def test_decomposed_program() -> None:
    model = trained(Custom(lambda m, x: m.norm(m.conv(x))))
    (left,) = folds(bn_ext.fold(torch.export.export(model, (image(),)).run_decompositions()))
    assert str(left).startswith("norm: not folded (the program is decomposed")


def test_graph_module_of_a_program() -> None:
    module = exported(trained(Custom(lambda m, x: m.norm(m.conv(x)))).double()).module()
    with pytest.raises(ValueError, match="or fold the program"):
        bn_ext.fold(module)


def test_exported_batch_norm_in_training() -> None:
    model = Custom(lambda m, x: m.norm(m.conv(x)))
    assert outcomes(bn_ext.fold(torch.export.export(model, (image(),)))) == {"norm": ""}


def test_exported_batch_norm_over_positions() -> None:
    model = trained(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))
    x = torch.randn(2, 6, 6)
    folded = bn_ext.fold(torch.export.export(model, (x,)))
    assert "does not normalize" in str(folds(folded)[0])
    assert_same_outputs(folded.module(), model, x, tolerance=0)
