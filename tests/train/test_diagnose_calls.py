"""Findings about the order of calls: each speaks where it should, and is silent where it must be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import lookalikes
import pytest
import torch
import torch.nn.functional as F
from diagnosed import BIAS, DROPOUT, IMAGES, PREPARATIONS, WAYS, Calls, conv, found, frozen, norm
from lookalikes import homes  # noqa: F401
from networks import NETWORKS
from torch import nn
from torch.nn.utils import parametrizations

import bn_ext


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    finds: list[tuple[str, str]]


def sequence(*layers: nn.Module) -> Case:
    """A model that there is nothing to say about."""
    return Case(lambda: copy.deepcopy(nn.Sequential(*layers)), [])


CALLS: dict[str, Case] = {
    "bias": Case(lambda: nn.Sequential(conv(bias=True), norm()), BIAS),
    "bias of a transposed convolution": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 1), norm()), [("0", "bias of ConvTranspose2d before batch norm")]
    ),
    "bias of a linear layer": Case(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)),
        [("1", "bias of Linear before batch norm")],
    ),
    "bias of a layer with a computed weight": Case(
        lambda: nn.Sequential(parametrizations.weight_norm(conv(bias=True)), norm()),
        BIAS,
    ),
    "bias without running statistics": Case(
        lambda: nn.Sequential(conv(bias=True), norm(track_running_stats=False)), BIAS
    ),
    "bias in a model in evaluation": Case(lambda: nn.Sequential(conv(bias=True), frozen(norm())).eval(), BIAS),
    "bias that others read": Case(
        lambda: Calls(lambda m, x: (y := m.conv(x)) + m.norm(y), conv=conv(bias=True), norm=norm()), []
    ),
    "bias that is added": Case(
        lambda: Calls(lambda m, x: m.norm(m.conv(x)) + m.conv.bias.sum(), conv=conv(bias=True), norm=norm()), []
    ),
    "bias before two batch norms": Case(
        lambda: Calls(lambda m, x: m.one(y := m.conv(x)) + m.two(y), conv=conv(bias=True), one=norm(), two=norm()), []
    ),
    "bias of a layer that is called twice": Case(
        lambda: Calls(lambda m, x: m.norm(m.conv(x)) + m.conv(x), conv=conv(bias=True), norm=norm()), []
    ),
    "bias before a frozen one": sequence(conv(bias=True), frozen(norm())),
    "bias before an activation": sequence(norm(), conv(bias=True), nn.ReLU()),
    "bias before other channels": Case(
        lambda: Calls(lambda m, x: m.norm(m.linear(x.flatten(2))), linear=nn.Linear(64, 5), norm=nn.BatchNorm1d(3)), []
    ),
    "no bias": sequence(conv(), norm()),
    "dropout": Case(lambda: nn.Sequential(nn.Dropout(0.3), conv(), nn.ReLU(), conv(), norm()), [("4", DROPOUT)]),
    "dropout of channels": Case(lambda: nn.Sequential(nn.Dropout2d(0.3), norm()), [("1", DROPOUT)]),
    "dropout between a layer and its batch norm": Case(
        lambda: nn.Sequential(conv(bias=True), nn.Dropout(0.3), norm()), [("2", DROPOUT)]
    ),
    "dropout as a function": Case(
        lambda: Calls(lambda m, x: m.norm(m.conv(F.dropout(x, 0.3, m.training))), conv=conv(), norm=norm()),
        [("norm", DROPOUT)],
    ),
    "dropout added": Case(
        lambda: Calls(lambda m, x: m.norm(x + m.drop(x)), drop=nn.Dropout(0.3), norm=norm()), [("norm", DROPOUT)]
    ),
    "dropout before a batch norm before another": Case(
        lambda: nn.Sequential(nn.Dropout(0.3), norm(), conv(), norm()), [("1", DROPOUT)]
    ),
    "dropout of another branch": Case(
        lambda: Calls(lambda m, x: m.drop(x) + m.norm(x), drop=nn.Dropout(0.3), norm=norm()), []
    ),
    "dropout after batch norm": sequence(norm(), nn.Dropout(0.3), conv()),
    "dropout of nothing": sequence(nn.Dropout(0), norm()),
    "dropout in evaluation": sequence(nn.Dropout(0.3).eval(), norm()),
    "dropout as a function in evaluation": Case(
        lambda: Calls(lambda m, x: m.norm(F.dropout(x, 0.3, False)), norm=norm()), []
    ),
    "dropout before a frozen one": sequence(nn.Dropout(0.3), frozen(norm())),
    "activation": Case(lambda: nn.Sequential(conv(), nn.ReLU(), norm()), [("2", "batch norm after relu")]),
    "activation in place": Case(
        lambda: nn.Sequential(conv(bias=True), nn.ReLU(inplace=True), norm()), [("2", "batch norm after relu")]
    ),
    "activation as a method": Case(
        lambda: Calls(lambda m, x: m.norm(m.conv(x).sigmoid_().float()), conv=conv(), norm=norm()),
        [("norm", "batch norm after sigmoid")],
    ),
    "activation and pool": Case(
        lambda: nn.Sequential(conv(), nn.LeakyReLU(), nn.MaxPool2d(2), norm()), [("3", "batch norm after leakyrelu")]
    ),
    "activation of a batch norm": sequence(conv(), norm(), nn.ReLU(), norm()),
    "activation of the input": sequence(nn.ReLU(), norm()),
    "activation of another branch": Case(
        lambda: Calls(lambda m, x: m.norm((y := m.conv(x)) * y.sigmoid()), conv=conv(), norm=norm()), []
    ),
    "activation before a frozen one": sequence(conv(), nn.ReLU(), frozen(norm())),
    "activation after batch norm": sequence(conv(), norm(), nn.ReLU(), conv(), norm(), nn.GELU()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_order_of_calls(name: str, way: str) -> None:
    case = CALLS[name]
    for prepare in (PREPARATIONS["plain"], PREPARATIONS["converted"]):
        assert found(prepare(case.make()), example=WAYS[way]) == case.finds


def test_order_of_calls_in_fused_models() -> None:
    """What is called by itself counts, not what a fused call does in one."""
    layers = [conv(bias=True), norm(), nn.ReLU(), nn.Dropout(0.3), conv(), nn.ReLU(), norm()]
    model = bn_ext.fuse(nn.Sequential(*layers), IMAGES)
    for example in WAYS.values():
        assert found(model, example=example) == [*BIAS, ("6", DROPOUT), ("6", "batch norm after relu")]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """Of those in use only the U-Net has something to say, in both ways: its convolutions have biases."""
    network = NETWORKS[name]
    model = network.make()
    runs = found(model, torch.optim.Adam(model.parameters()), network.input(32), batches=1000)
    assert {what for _, what in runs} == ({"bias of Conv3d before batch norm"} if name == "unet3d" else set())
    assert len(runs) == (6 if name == "unet3d" else 0)
    assert found(model) == runs


def test_a_model_that_no_trace_tells() -> None:
    """What is in it is not seen without an example."""
    model = Calls(lambda m, x: x if x.sum() > 9e9 else m.norm(m.conv(x)), conv=conv(bias=True), norm=norm())
    assert found(model) == []
    assert found(model, example=IMAGES) == [("conv", "bias of Conv2d before batch norm")]

    model.call = lambda m, x: x if (y := m.norm(m.conv(x).relu())).sum() > 9e9 else y
    assert found(model) == []
    assert found(model, example=IMAGES) == [("norm", "batch norm after relu")]


def test_a_bias_before_positions() -> None:
    """Of (N, L, C) a batch norm normalizes each of the positions, here as many as there are channels."""
    parts = {"linear": nn.Linear(64, 3), "norm": nn.BatchNorm1d(3)}
    assert found(Calls(lambda m, x: m.norm(m.linear(x.flatten(2))), **parts), example=IMAGES) == []
    assert found(Calls(lambda m, x: m.norm(m.linear(x[:, 0].flatten(1))), **parts), example=IMAGES)


def test_branches_of_training() -> None:
    model = Calls(lambda m, x: m.norm(m.conv(x)) if m.training else x, conv=conv(bias=True), norm=norm())
    for mode in (True, False):
        model.norm.num_batches_tracked.fill_(1)
        assert found(model.train(mode), example=IMAGES) == [("conv", "bias of Conv2d before batch norm")]


@pytest.mark.usefixtures("homes")
@pytest.mark.parametrize("prepare", [lambda model: model, bn_ext.convert])
def test_classes_of_others(prepare: Callable) -> None:
    """timm's batch norm holds an activation; frozen ones of any library normalize by no batch."""
    layers = [conv(bias=True), nn.Dropout(0.3), lookalikes.BatchNormAct2d(3), conv(bias=True)]
    model = nn.Sequential(*layers, lookalikes.BatchNormAct2d(3, momentum=0.9))
    decay = torch.optim.SGD(model.parameters(), weight_decay=0.5)
    for way in (IMAGES, None):
        assert found(prepare(model), decay, way) == [
            ("3", "bias of Conv2d before batch norm"),
            ("2", DROPOUT),
            ("2", "weight decay of 0.5 on weight and bias"),
            ("4", "weight decay of 0.5 on weight and bias"),
            ("4", "a momentum of 0.9 sees 1.2 batches"),
        ]
    for cls in lookalikes.FROZEN:
        model = nn.Sequential(conv(bias=True), nn.ReLU(), nn.Dropout(0.3), lookalikes.trained(cls(3)))
        assert found(prepare(model), example=IMAGES[:1], batches=1, accumulation=2) == []
