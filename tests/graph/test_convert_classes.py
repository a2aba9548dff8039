"""bn_ext.convert takes subclasses that override nothing that computes, and believes no name without a trial."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from lookalikes import (  # noqa: F401
    BatchNormAct2d,
    DetrFrozenBatchNorm2d,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
    homes,
    is_fused,
    trained,
)
from modules import unmarked
from torch import Tensor, nn

import bn_ext
from bn_ext.graph.conversion import trial

pytestmark = [pytest.mark.usefixtures("homes"), pytest.mark.filterwarnings("error:bn_ext.convert")]

# ---------------------------------------------------------------------------------------------- subclasses


class Quiet(nn.BatchNorm2d):
    """Overrides nothing that computes."""

    note: str = "of the class"

    def __init__(self, channels: int, zero: bool = False) -> None:
        super().__init__(channels, eps=1e-3)
        self.zero = zero

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zero={self.zero}"

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, 0.5)

    def train(self, mode: bool = True) -> Quiet:
        return super().train(mode and self.weight.requires_grad)

    def more(self) -> str:
        return self.note


class Quieter(Quiet):
    pass


class QuietFrozen(FrozenBatchNorm2d):
    """Of a class that is not torch's."""


class Mixin:
    def helper(self) -> int:
        return 3


class Mixed(Mixin, nn.BatchNorm1d):
    __slots__ = ()


class Volume(nn.BatchNorm3d):
    pass


@pytest.mark.parametrize(
    ("cls", "base", "shape"),
    [
        (Quiet, bn_ext.BatchNorm2d, (4, 3, 5, 2)),
        (Quieter, bn_ext.BatchNorm2d, (4, 3, 5, 2)),
        (Mixed, bn_ext.BatchNorm1d, (4, 3)),
        (Volume, bn_ext.BatchNorm3d, (4, 3, 2, 2, 2)),
        (QuietFrozen, QuietFrozen, (4, 3, 5, 2)),
    ],
)
def test_subclasses_that_override_nothing_that_computes(cls: type, base: type, shape: tuple[int, ...]) -> None:
    theirs = trained(cls(3))
    mine = bn_ext.convert(copy.deepcopy(theirs))
    assert isinstance(mine, cls)
    assert isinstance(mine, base)
    assert type(mine) is not cls
    assert unmarked(repr(mine)) == repr(theirs) != repr(mine)
    for x in torch.randn(2, *shape):
        for module in (mine, theirs):
            module.train()
        torch.testing.assert_close(mine(x), theirs(x))
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert is_fused(mine, x)
    assert type(bn_ext.revert(mine)) is cls


def test_what_a_subclass_adds_goes_on_working() -> None:
    module = bn_ext.convert(Quiet(3))
    module.reset_parameters()
    assert module.weight.eq(0.5).all()
    assert module.more() == "of the class"
    assert bn_ext.convert(Mixed(3)).helper() == 3


def defines(**names: object) -> type:
    return type("Own", (nn.BatchNorm2d,), names)


class Metaclass(type):
    pass


class OwnMetaclass(nn.BatchNorm2d, metaclass=Metaclass):
    pass


class OwnLazy(nn.LazyBatchNorm2d):
    pass


class ForwardInMixin:
    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixed2(ForwardInMixin, nn.BatchNorm2d):
    pass


LEFT = {
    "forward": (defines(forward=lambda self, x: x), "a forward of their own"),
    "forward in a mixin": (Mixed2, "a forward of their own"),
    "check": (defines(_check_input_dim=lambda self, x: None), "_check_input_dim of their own"),
    "call": (defines(__call__=lambda self, x: x), "__call__ of their own"),
    "call_impl": (defines(_call_impl=lambda self, x: x), "_call_impl of their own"),
    "getattr": (defines(__getattr__=nn.Module.__getattr__), "__getattr__ of their own"),
    "getattribute": (defines(__getattribute__=object.__getattribute__), "__getattribute__ of their own"),
    "weight": (defines(weight=property(lambda self: self._parameters["weight"] * 2)), "weight of their own"),
    "running_var": (defines(running_var=None), "running_var of their own"),
    "training": (defines(training=property(lambda self: False, lambda self, mode: None)), "training of their own"),
    "our method": (defines(_fused=lambda self: None, _original=None), "_fused, _original of their own"),
    "metaclass": (OwnMetaclass, "a metaclass of their own"),
    "lazy": (OwnLazy, "a forward of their own"),
}


@pytest.mark.parametrize("case", LEFT)
def test_subclasses_that_override_what_computes_are_left(case: str) -> None:
    cls, reason = LEFT[case]
    module = nn.LazyBatchNorm2d() if case == "lazy" else nn.BatchNorm2d(3)
    module.__class__ = cls
    with pytest.warns(UserWarning, match=rf"0 of 1 batch norms .* 1 {cls.__name__} \({reason}\), e.g. 0$"):
        bn_ext.convert(nn.Sequential(module))
    assert type(module) is cls


# ---------------------------------------------------------------------------------------------- impostors


def impostor(base: type = BatchNormAct2d, **names: object) -> type:
    """Another class under the same full name."""
    return type(base.__name__, (base,), {"__module__": base.__module__, **names})


def only_in(mode: bool) -> Callable:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = BatchNormAct2d.forward(self, x)
        return y * (1.001 if self.training is mode else 1)

    return forward


def other_statistics(self: nn.Module, x: Tensor) -> Tensor:
    if self.training:
        self.running_mean += 0.01
    return BatchNormAct2d.forward(self, x)


def counts_twice(self: nn.Module, x: Tensor) -> Tensor:
    if self.training:
        self.num_batches_tracked += 1
    return BatchNormAct2d.forward(self, x)


def without_bias(self: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, None, eps=1e-5)


def broken(self: nn.Module, x: Tensor) -> Tensor:
    raise KeyError("broken")


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (lambda: impostor(forward=only_in(True)), "other outputs in training on a random input"),
        (lambda: impostor(forward=only_in(False)), "other outputs in evaluation on a random input"),
        (lambda: impostor(forward=other_statistics), "other statistics in training on a random input"),
        (lambda: impostor(forward=counts_twice), "other statistics in training on a random input"),
        (lambda: impostor(forward=lambda self, x: x.double()), "other outputs in evaluation on a random input"),
        (lambda: impostor(forward=broken), "KeyError on a random input"),
        (lambda: impostor(DetrFrozenBatchNorm2d, forward=without_bias), "other outputs in evaluation"),
        (
            lambda: impostor(
                DetrFrozenBatchNorm2d,
                forward=lambda self, x: nn.functional.batch_norm(
                    x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-6
                ),
            ),
            "other outputs in evaluation",
        ),
    ],
)
def test_the_name_alone_is_not_enough(cls: Callable[[], type], reason: str) -> None:
    module = cls()(3)
    kind = type(module)
    with pytest.warns(UserWarning, match=rf"0 of 1 .* 1 {kind.__name__} \({reason}"):
        bn_ext.convert(module)
    assert type(module) is kind


def test_the_full_name_is_needed() -> None:
    module = impostor(__module__="timm.layers.other")(3)
    assert type(bn_ext.convert(module)) is not type(module).__mro__[2], "a subclass that overrides nothing"
    cls = type("BatchNormAct2d", (nn.BatchNorm2d,), {"forward": BatchNormAct2d.forward, "__module__": "timm.other"})
    with pytest.warns(UserWarning, match=r"1 BatchNormAct2d \(a forward of their own\)"):
        assert type(bn_ext.convert(cls(3))) is cls


# ---------------------------------------------------------------------------------------------- the trial


def test_the_trial_leaves_everything_as_it_was(device: str) -> None:
    seen = []
    module = trained(BatchNormAct2d(3, nn.PReLU(), nn.Dropout(0.5))).to(device)
    for part in module.modules():
        part.register_forward_pre_hook(lambda *_: seen.append("hook"))
    state = copy.deepcopy(module.state_dict())
    randomness = torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])
    bn_ext.convert(module)
    assert type(module) is not BatchNormAct2d
    assert seen == []
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(
        randomness, (torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else []))
    )


def test_a_running_mean_that_is_a_plain_attribute_is_not_moved() -> None:
    module = BatchNormAct2d(3)
    del module.running_mean
    module.running_mean = torch.zeros(3)
    bn_ext.convert(module)
    assert module.running_mean.eq(0).all()


def test_one_trial_for_each_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, difference = [], trial._difference
    monkeypatch.setattr(trial, "_difference", lambda module, cls: tried.append(module) or difference(module, cls))
    model = nn.Sequential(*(BatchNormAct2d(4).train(i % 2 == 0) for i in range(100)), *(Quiet(4) for _ in range(50)))
    bn_ext.convert(model)
    assert len(tried) == 2
    changed = [
        BatchNormAct2d(4),
        BatchNormAct2d(4, momentum=None),
        BatchNormAct2d(4, nn.SiLU()),
        BatchNormAct2d(4, nn.ELU(0.5)),
    ]
    changed += [BatchNormAct2d(4, affine=False), BatchNormAct2d(4).double(), BatchNormAct2d(4, nn.ELU(0.6))]
    bn_ext.convert(nn.Sequential(*changed))
    assert len(tried) == 2 + len(changed)


def test_the_trial_has_an_input_of_as_many_channels() -> None:
    """Whatever else the module holds."""
    cls = impostor(
        FrozenBatchNormAct2d, forward=lambda self, x: FrozenBatchNormAct2d.forward(self, x) + (len(x[0]) > 1)
    )
    module = cls(3, nn.PReLU())
    with pytest.warns(UserWarning, match="other outputs in evaluation"):
        bn_ext.convert(module)


def test_torchs_own_need_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_difference", None)
    bn_ext.convert(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.LazyBatchNorm2d()))


def test_a_forward_set_on_the_object_is_not_tried() -> None:
    module, seen = Quiet(3), []
    module.forward = lambda input: seen.append(input) or input * 0 + 7
    assert type(bn_ext.convert(module)) is not Quiet
    assert seen == []
    assert module(torch.randn(2, 3, 4, 4)).eq(7).all()
