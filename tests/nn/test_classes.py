"""Two rules for every class: what changes the result of one call is an argument of the call, and a subclass of torch's
computes in evaluation what torch's computes from the same state."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bn_ext
from bn_ext.functional import finished

CLASSES = [
    one for name in bn_ext.__all__ if inspect.isclass(one := getattr(bn_ext, name)) and issubclass(one, nn.Module)
]
CLASSES.remove(bn_ext.SyncBatchNorm)  # which is of no rank: test_sync_convert.py
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
SUBCLASSES = [cls for cls in CLASSES if issubclass(cls, _BatchNorm)]
SHAPES = {"1d": (5, 3, 7), "2d": (5, 3, 2, 4), "3d": (5, 3, 2, 2, 2)}


def trained(cls: type) -> nn.Module:
    module = cls(3)
    with torch.no_grad():
        for t in (*module.parameters(), module.running_mean):
            t.normal_()
        module.running_var.uniform_(0.5, 2)
    return module.eval()


def input_of(cls: type) -> torch.Tensor:
    return torch.randn(SHAPES[cls.__name__[-2:]])


def torchs(cls: type) -> type:
    return getattr(nn, f"BatchNorm{cls.__name__[-2:]}")


@pytest.mark.parametrize("cls", SUBCLASSES, ids=lambda cls: cls.__name__)
def test_what_changes_a_call_is_an_argument_of_the_call(cls: type) -> None:
    """So torch's class in the place of ours fails loudly."""
    base = torchs(cls)
    assert inspect.signature(cls) == inspect.signature(base)
    module, x = trained(cls), input_of(cls)
    ours = module(x, x, activation="relu")
    torch.testing.assert_close(ours, torch.relu(module(x) + x))
    module.__class__ = base
    for options in ({"residual": x}, {"activation": "relu"}):
        with pytest.raises(TypeError):
            module(x, **options)


@every_class
def test_a_subclass_of_torchs_computes_what_torchs_computes(cls: type) -> None:
    module, theirs, x = trained(cls), torchs(cls)(3).eval(), input_of(cls)
    theirs.load_state_dict(module.state_dict())
    expected = theirs(x)
    if issubclass(cls, _BatchNorm):
        assert issubclass(cls, torchs(cls))
        torch.testing.assert_close(module(x), expected)
    else:
        torch.testing.assert_close(module(x), finished(expected, None, module.activation, None))
        with pytest.raises(AssertionError):
            torch.testing.assert_close(module(x), expected)


def frozen(model: nn.Module) -> nn.Module:
    """By class, as timm's, Lightning's and many a project's converters find batch norms."""
    for name, child in model.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(model, name, nn.Identity())
        else:
            frozen(child)
    return model


@every_class
@pytest.mark.parametrize("converter", [nn.SyncBatchNorm.convert_sync_batchnorm, frozen, bn_ext.convert, bn_ext.revert])
def test_converters_leave_an_activation_in_its_place(cls: type, converter) -> None:
    model = nn.Sequential(trained(cls))
    converter(model)
    assert (type(model[0]) is cls) == (converter is bn_ext.convert or not issubclass(cls, _BatchNorm))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_batch_norm_act(rank: int) -> None:
    cls = getattr(bn_ext, f"BatchNormAct{rank}d")
    assert cls(3).activation == "relu"
    for dims in {1, 2, 3} - {rank}:
        with pytest.raises(ValueError, match=r"expected .* input"):
            cls(3)(torch.randn(2, 3, *[4] * dims))
    x = torch.randn(2, 3, *[4] * rank)
    torch.testing.assert_close(cls(3, activation=None)(x), getattr(nn, f"BatchNorm{rank}d")(3)(x))
