"""Each function for whole models refuses what is no model, with its name, what it takes and what it got."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from torch import nn

import bn_ext

TAKES = {
    "convert": "torch.nn.Module",
    "revert": "torch.nn.Module",
    "fuse": "torch.nn.Module",
    "fold": "torch.nn.Module or ExportedProgram",
    "graph.fusions": "torch.nn.Module",
    "graph.folds": "torch.nn.Module or ExportedProgram",
    "graph.unfuse": "torch.nn.Module",
}


@pytest.mark.parametrize("function", TAKES)
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (None, "an object of NoneType"),
        ([nn.BatchNorm2d(2)], "an object of list"),
        (torch.zeros(2), "an object of Tensor"),
        (nn.BatchNorm2d, "the class BatchNorm2d"),
    ],
)
def test_no_model(function: str, given: object, got: str) -> None:
    with pytest.raises(TypeError) as caught:
        attrgetter(function)(bn_ext)(given)
    assert str(caught.value) == f"bn_ext.{function}: model should be a {TAKES[function]}, got {got}"


@pytest.mark.parametrize("modes", ["train", ["test"], 3, [["eval"]]])
def test_modes_of_fuse(modes: object) -> None:
    with pytest.raises(ValueError, match=r"bn_ext\.fuse: modes should be a sequence of 'train' and 'eval', got "):
        bn_ext.fuse(nn.Sequential(), modes=modes)
