"""Quantization looks for torch's own classes: it takes a reverted model; of a converted one it makes nothing wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    fuse_modules,
    fuse_modules_qat,
    get_default_qat_qconfig,
    get_default_qat_qconfig_mapping,
    get_default_qconfig,
    get_default_qconfig_mapping,
    prepare,
    prepare_qat,
)
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

import bn_ext

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
BACKEND = torch.backends.quantized.engine


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.dequantize = QuantStub(), DeQuantStub()
        self.conv1, self.norm1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(self.quantize(x))))
        return self.dequantize(self.norm2(self.conv2(x)))


CHAINS = [["conv1", "norm1", "relu"], ["conv2", "norm2"]]


def calibrated(model: nn.Module, input: Tensor) -> nn.Module:
    """After what all of them do between preparing and converting."""
    model(input)
    return model.eval()


def eager(model: nn.Module, input: Tensor, chains: list | None = CHAINS) -> nn.Module:
    model.eval().qconfig = get_default_qconfig(BACKEND)
    model = fuse_modules(model, chains) if chains else model
    return convert(calibrated(prepare(model), input))


def eager_qat(model: nn.Module, input: Tensor, chains: list | None = CHAINS) -> nn.Module:
    model.train().qconfig = get_default_qat_qconfig(BACKEND)
    model = fuse_modules_qat(model, chains) if chains else model
    return convert(calibrated(prepare_qat(model), input))


def fx(model: nn.Module, input: Tensor) -> nn.Module:
    prepared = prepare_fx(model.eval(), get_default_qconfig_mapping(BACKEND), (input,))
    return convert_fx(calibrated(prepared, input))


def fx_qat(model: nn.Module, input: Tensor) -> nn.Module:
    prepared = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping(BACKEND), (input,))
    return convert_fx(calibrated(prepared, input))


@pytest.fixture
def input() -> Tensor:
    return torch.randn(8, 3, 8, 8)


@pytest.fixture
def plain(input: Tensor) -> nn.Module:
    model = Network()
    model(input)
    return model


@pytest.mark.parametrize("flow", [eager, eager_qat, fx, fx_qat])
def test_reverted(flow: Callable, plain: nn.Module, input: Tensor) -> None:
    reverted = bn_ext.revert(bn_ext.convert(copy.deepcopy(plain)))
    assert torch.equal(flow(reverted, input)(input), flow(plain, input)(input))


@pytest.mark.parametrize("flow", [eager, eager_qat])
def test_fusing_refuses_ours(flow: Callable, plain: nn.Module, input: Tensor) -> None:
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*bn_ext\.nn\.batch_norm\.BatchNorm2d"):
        flow(bn_ext.convert(plain), input)


@pytest.mark.parametrize("flow", [eager, eager_qat])
def test_kernels_refuse_quantized_inputs(flow: Callable, plain: nn.Module, input: Tensor) -> None:
    with pytest.raises(NotImplementedError, match="\"batch_norm\" not implemented for 'QUInt8'"):
        flow(bn_ext.convert(plain), input, chains=None)(input)


@pytest.mark.parametrize("flow", [fx, fx_qat])
def test_fx_leaves_ours_in_floating_point(flow: Callable, plain: nn.Module, input: Tensor) -> None:
    expected = copy.deepcopy(plain)
    quantized = flow(bn_ext.convert(plain), input)
    assert type(quantized.norm1) is bn_ext.BatchNorm2d
    if flow is fx_qat:  # prepared in training, it has seen one batch more
        expected.train()(input)
    error = (quantized(input) - expected.eval()(input)).abs()
    assert error.mean() < 0.05 * expected(input).std()
