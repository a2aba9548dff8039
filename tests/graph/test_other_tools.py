"""A fused model stands what other tools do with models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from fusing import Model
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import bn_ext


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def example() -> Tensor:
    return torch.randn(2, 3, 4, 4)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


def test_export() -> None:
    model = bn_ext.fuse(nn.Sequential(block())).eval()
    x = example()
    expected = model(x)
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        assert not [n for n in program.graph.nodes if "bn_ext" in str(n.target)]
        torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_and_transforms() -> None:
    model = bn_ext.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).eval()
    x = example()
    expected = model(x)
    outer = nn.Sequential(model, nn.Identity())
    by_fx = [torch.fx.symbolic_trace(model), torch.fx.symbolic_trace(outer), make_fx(model)(x), make_fx(outer)(x)]
    for traced in (torch.jit.trace(model, x), *by_fx):
        torch.testing.assert_close(traced(x), expected)
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), x), expected)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    assert torch.func.functional_call(model, zeros, x).eq(0).all()
    torch.testing.assert_close(torch.vmap(model)(x[None])[0], expected)


def test_folds() -> None:
    model = bn_ext.fuse(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())).eval()
    x = example()
    torch.testing.assert_close(bn_ext.fold(model)(x), model(x))


def test_synchronized_batch_norms_are_put_in_place() -> None:
    """Nothing that was fused is lost with the modules."""
    x = torch.randn(2, 3, 5, 5)
    model = bn_ext.fuse(Model(lambda m, y, r: F.relu(y + r))).eval()
    expected = model(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.bn) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x), expected)
