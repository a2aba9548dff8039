"""Small models of timm's, whose batch norms are a class of its own that holds an activation."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import assert_same_training

import bn_ext
from bn_ext.graph import fusions

timm = pytest.importorskip("timm", reason="no timm to take models from", exc_type=ImportError)

# With what each batch norm does besides, on average: 1 for an activation or an addition after every one.
MODELS = {
    "ghostnet_100": 0.45,
    "lcnet_035": 1.0,
    "mnasnet_small": 0.85,
    "mobilenetv3_small_050": 0.8,
    "regnetx_002": 1.15,
    "repvgg_a0": 1.0,
    "resnet10t": 1.0,
    "tinynet_e": 0.75,
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch._dynamo.reset()
    plain = timm.create_model(name, num_classes=5, drop_rate=0.0).double()
    fused = bn_ext.fuse(copy.deepcopy(plain))
    batches = [torch.randn(4, 3, 64, 64, dtype=torch.float64) for _ in range(2)]
    assert_same_training(fused, plain, batches[:1], tolerance=1e-7)
    torch.testing.assert_close(fused.eval()(batches[1]), plain.eval()(batches[1]), rtol=1e-7, atol=1e-7)
    found = fusions(fused)
    assert sum(len(fusion.fused) for fusion in found) / len(found) >= MODELS[name]


def test_split_batch_norms() -> None:
    """What timm's conversion makes keeps the activation of what it converts, which domains take in the call."""
    plain = timm.layers.BatchNormAct2d(4)
    plain.weight.data.uniform_(0.5, 2)
    split = timm.layers.convert_splitbn_model(plain, num_splits=2)
    split.aux_bn[0].bias.data.normal_()
    with pytest.raises(ValueError, match="got SplitBatchNorm2d with ReLU behind it, as its act"):
        bn_ext.nn.DomainBatchNorm2d.from_batch_norm(split)
    x, domain = torch.randn(6, 4, 5, 5), torch.arange(2).repeat_interleave(3)
    alone = copy.deepcopy(split)
    alone.act = torch.nn.Identity()
    module = bn_ext.nn.DomainBatchNorm2d.from_batch_norm(alone)
    torch.testing.assert_close(module(x, domain, activation="relu"), split(x))
    torch.testing.assert_close(module.eval()(x, 0, activation="relu"), split.eval()(x))
    rows = torch.stack([split.running_var, split.aux_bn[0].running_var])
    torch.testing.assert_close(module.running_var, rows)
