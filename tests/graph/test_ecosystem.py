"""bn_ext.convert on timm, torchvision and transformers themselves, each where it is installed.

Their models have random weights and random statistics. Torchvision's wheel may hold operators for another torch than
the one installed; its Python needs two of their schemas, which are then declared here.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from modules import unmarked
from torch import nn

import bn_ext
from bn_ext.graph.conversion.classes import is_batch_norm, is_ours

pytestmark = pytest.mark.filterwarnings("error:bn_ext.convert")

_declared = torch.library.Library("torchvision", "FRAGMENT")


def package(name: str) -> ModuleType:
    top = name.partition(".")[0]
    pytest.importorskip(top, reason=f"{top} is not installed", exc_type=ModuleNotFoundError)
    return importlib.import_module(name)


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        for name in ("nms", "qnms"):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in filter(is_batch_norm, model.modules()):
            for name, t in module.state_dict(keep_vars=True).items():
                if t.is_floating_point() and "." not in name:
                    t.uniform_(0.5, 2) if name in ("weight", "running_var") else t.normal_(0, 0.1)
    return model.double()


def assert_converted(model: nn.Module, input: torch.Tensor, expected: int) -> None:
    """All of its batch norms, alike in evaluation and one training step, to be reverted."""
    original = trained(model)
    converted = bn_ext.convert(copy.deepcopy(original))
    assert sum(map(is_ours, converted.modules())) == sum(map(is_batch_norm, original.modules())) == expected
    assert list(converted.state_dict()) == list(original.state_dict())
    assert unmarked(repr(converted)) == repr(original)
    outputs = []
    for one in (converted, original):
        one.eval()
        with torch.no_grad():
            outputs += [one(input)]
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    states = []
    for one in (converted, original):
        one.train()
        torch.manual_seed(0)
        output = one(input)
        output.square().mean().backward()
        gradients = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        states.append((output, gradients, one.state_dict()))
    torch.testing.assert_close(*states, rtol=1e-6, atol=1e-9)
    reverted = bn_ext.revert(pickle.loads(pickle.dumps(converted)))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in original.modules()]


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("efficientnet_b0", 49),
        ("mobilenetv3_small_100", 34),
        ("regnety_002", 44),
        ("densenet121", 121),
        ("resnet18", 20),
        ("dpn48b", 54),
        ("lcnet_050", 27),
        ("vovnet39a", 39),
    ],
)
def test_timm(name: str, norms: int) -> None:
    model = package("timm").create_model(name, num_classes=10)
    assert_converted(model, torch.randn(3, 3, 64, 64).double(), norms)


def test_timms_frozen() -> None:
    model = package("timm.layers").freeze_batch_norm_2d(package("timm").create_model("mobilenetv3_small_100"))
    assert_converted(model, torch.randn(2, 3, 64, 64).double(), 34)


@pytest.mark.parametrize(
    "act",
    [
        "relu",
        "relu6",
        "silu",
        "swish",
        "gelu",
        "hard_swish",
        "hard_sigmoid",
        "tanh",
        "elu",
        "mish",
        "celu",
        "gelu_tanh",
    ],
)
def test_timms_activations_in_one_call(act: str) -> None:
    layers = package("timm.layers")
    for cls in (layers.BatchNormAct2d, layers.FrozenBatchNormAct2d):
        assert_one_call(cls(4, act_layer=act))


@pytest.mark.parametrize(
    ("module", "act"),
    [
        *(
            ("activations", act)
            for act in ("Swish", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "GELU", "GELUTanh", "Mish")
        ),
        ("activations_me", "SwishMe"),
        ("activations_me", "MishMe"),
    ],
)
def test_timms_own_activations_in_one_call(module: str, act: str) -> None:
    act_layer = getattr(package(f"timm.layers.{module}"), act)
    assert_one_call(package("timm.layers").BatchNormAct2d(4, act_layer=act_layer))


def assert_one_call(module: nn.Module) -> None:
    original = trained(module).eval()
    converted = bn_ext.convert(copy.deepcopy(original))
    inputs = [torch.randn(2, 4, 3, 3).double().requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [one(input) for one, input in zip((converted, original), inputs, strict=True)]
    assert "bn::ops" in outputs[0].grad_fn.name(), "no activation behind it"
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_timms_converters_take_ours() -> None:
    layers = package("timm.layers")
    original = trained(nn.Sequential(layers.BatchNormAct2d(4, act_layer="silu"), layers.FrozenBatchNormAct2d(4))).eval()
    original[1].num_features, original[1].affine = 4, True
    x = torch.randn(2, 4, 3, 3).double()
    for change in (layers.freeze_batch_norm_2d, layers.unfreeze_batch_norm_2d):
        changed = change(bn_ext.convert(copy.deepcopy(original))).double().eval()
        torch.testing.assert_close(changed(x), original(x))


def test_timms_synchronized_ones_are_left() -> None:
    layers = package("timm.layers")
    model = layers.convert_sync_batchnorm(nn.Sequential(layers.BatchNormAct2d(4), nn.BatchNorm2d(4)))
    with pytest.warns(
        UserWarning, match=r"0 of 2 .*: 1 SyncBatchNormAct \(statistics across processes\), e.g. 0; 1 Sync"
    ):
        bn_ext.convert(model)


def test_torchvision_frozen() -> None:
    frozen = package("torchvision.ops").FrozenBatchNorm2d
    assert_converted(package("torchvision.models").resnet18(norm_layer=frozen), torch.randn(2, 3, 64, 64).double(), 20)


@pytest.mark.parametrize(
    "module", ["detr", "deformable_detr", "rt_detr", "conditional_detr", "table_transformer", "d_fine"]
)
def test_transformers_frozen(module: str) -> None:
    home = package(f"transformers.models.{module}.modeling_{module}")
    (frozen,) = (cls for name, cls in vars(home).items() if name.endswith("FrozenBatchNorm2d"))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen(4), nn.ReLU())
    assert_converted(model, torch.randn(2, 3, 8, 8).double(), 1)


def test_none_is_imported() -> None:
    code = "import sys, bn_ext, torch; bn_ext.convert(torch.nn.BatchNorm2d(2)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "torchvision", "transformers"} & set(loaded)
