"""bn_ext.convert and revert: classes change, everything else is the same object."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from networks import NETWORKS, assert_same_training
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import bn_ext

PAIRS = [
    (nn.BatchNorm1d, bn_ext.BatchNorm1d),
    (nn.BatchNorm2d, bn_ext.BatchNorm2d),
    (nn.BatchNorm3d, bn_ext.BatchNorm3d),
]


class Own(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class OwnOfOurs(bn_ext.BatchNorm2d):
    pass


def network() -> nn.Module:
    shared = nn.BatchNorm2d(4)
    block = nn.ModuleDict({"norm": nn.BatchNorm2d(4, momentum=None), "again": shared})
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), shared, block["norm"], shared, nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4))
    )


@pytest.mark.parametrize(("theirs", "mine"), PAIRS)
def test_the_model_itself(theirs: type, mine: type) -> None:
    module = theirs(3)
    assert bn_ext.convert(module) is module
    assert type(module) is mine
    assert bn_ext.revert(module) is module
    assert type(module) is theirs


def test_nothing_but_the_class_changes() -> None:
    model = network().eval()
    norm = model[1]
    seen = []
    norm.register_forward_hook(lambda *_: seen.append("hook"))
    norm.weight.requires_grad_(False)
    norm.note = "kept"
    before = [(m, dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    assert bn_ext.convert(model) is model
    for module, (same, attributes, parameters, buffers) in zip(model.modules(), before, strict=True):
        assert module is same
        assert vars(module) == attributes
        assert all(module._parameters[k] is p for k, p in parameters.items())
        assert all(module._buffers[k] is b for k, b in buffers.items())
    assert model[1] is model[3]
    model(torch.randn(2, 3, 5, 5))
    assert seen == ["hook"] * 2


def test_every_module_is_converted_and_reverted() -> None:
    model = network()
    types = [type(m) for m in model.modules()]
    ours = dict(PAIRS)
    assert [type(m) for m in bn_ext.convert(model).modules()] == [ours.get(t, t) for t in types]
    assert [type(m) for m in bn_ext.convert(model).modules()] == [ours.get(t, t) for t in types], "twice"
    assert [type(m) for m in bn_ext.revert(model).modules()] == types
    assert [type(m) for m in bn_ext.revert(model).modules()] == types, "twice"


@pytest.mark.parametrize("make", [Own, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm])
def test_left_alone(make: type) -> None:
    module = make(2, 4) if make is nn.GroupNorm else make(4)
    for change in (bn_ext.convert, bn_ext.revert):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert type(change(nn.Sequential(module))[0]) is make


def warned(model: nn.Module, **options) -> list[str]:
    """The warnings of a conversion."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert bn_ext.convert(model, **options) is model
    assert all(one.category is UserWarning and one.filename == __file__ for one in seen), "the caller's line"
    return [str(one.message) for one in seen]


def test_one_warning_says_what_is_left() -> None:
    block = nn.Sequential(
        nn.BatchNorm2d(2), Own(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2, track_running_stats=True)
    )
    model = nn.ModuleDict(
        {"stem": Own(2), "block": block, "norm": bn_ext.BatchNorm1d(2), "ours": bn_ext.BatchNormAct2d(2)}
    )
    left = (
        "left as they are: 2 Own (a forward of their own), e.g. stem; "
        "1 SyncBatchNorm (statistics across processes), e.g. block.2"
    )
    for _ in range(2):
        assert warned(model) == [f"bn_ext.convert: 3 of 6 batch norms converted; {left}"]
    model["again"] = model["block"]
    assert warned(model) == [f"bn_ext.convert: 3 of 6 batch norms converted; {left}"], "shared ones count once"
    assert warned(Own(2))[0].endswith("1 Own (a forward of their own), e.g. the model itself")


class HoldsABatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2)


def test_no_warning_where_nothing_is_left() -> None:
    counts = nn.Module()  # no batch norm, though it has the buffers of one
    counts.register_buffer("running_mean", torch.zeros(2))
    instance = nn.InstanceNorm2d(2, track_running_stats=True)
    for model in (network(), nn.ReLU(), instance, nn.Sequential(), counts, HoldsABatchNorm()):
        assert warned(model) == []


def test_where_is_asked_before_anything_changes() -> None:
    model = network()
    types = [type(m) for m in model.modules()]

    def where(path: str, module: nn.Module) -> bool:
        if path == "2":
            raise KeyError(path)
        return True

    for wrong, error in ((where, KeyError), ("1", TypeError)):
        with pytest.raises(error):
            bn_ext.convert(model, where=wrong)
    assert [type(m) for m in model.modules()] == types


def test_where_selects() -> None:
    model, asked = network(), []

    def where(path: str, module: nn.Module) -> bool:
        asked.append((path, module))
        return path.startswith("4")

    model.append(bn_ext.BatchNorm2d(2))
    assert warned(model, where=where) == []
    assert asked == [("1", model[1]), ("2", model[2]), ("4.1", model[4][1])], (
        "ours are no question, shared ones are one"
    )
    assert [type(model[i]) for i in (1, 2)] == [nn.BatchNorm2d] * 2
    assert type(model[4][1]) is bn_ext.BatchNorm1d
    own = nn.Sequential(Own(2), Own(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    assert warned(own, where=lambda path, module: False) == []
    assert warned(own, where=lambda path, module: path in "02") == [
        "bn_ext.convert: 1 of 2 batch norms converted; left as they are: 1 Own (a forward of their own), e.g. 0"
    ]


@pytest.mark.parametrize(("theirs", "mine"), PAIRS)
def test_lazy_modules(theirs: type, mine: type) -> None:
    """They become ours with their first input, or torch's again if reverted before."""
    lazy = getattr(nn, f"Lazy{theirs.__name__}")
    input = torch.randn(4, 3, *[2] * (int(theirs.__name__[-2]) - (theirs is nn.BatchNorm1d)))
    models = [bn_ext.convert(nn.Sequential(lazy())) for _ in range(2)]
    bn_ext.revert(models[1])
    assert type(models[1][0]) is lazy
    for model, kind in zip(models, (mine, theirs), strict=True):
        assert isinstance(model[0], lazy)
        model(input)
        assert type(model[0]) is kind
    torch.testing.assert_close(*[model.state_dict() for model in models])
    assert vars(models[0][0]).keys() == vars(models[1][0]).keys()


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x)

    def right_inverse(self, y: Tensor) -> Tensor:
        return y.expm1().log()


def parametrized() -> nn.Module:
    """A batch norm between others, its weight parametrized."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    parametrize.register_parametrization(model[1], "weight", Softplus())
    return model


def test_parametrizations_are_kept() -> None:
    original = parametrized()
    converted = copy.deepcopy(original)
    theirs = type(original[1])
    bn_ext.convert(converted)
    assert type(original[1]) is theirs
    assert not isinstance(original[1], bn_ext.BatchNorm2d), "a copy of the same class, not in the model"
    assert isinstance(converted[1], bn_ext.BatchNorm2d)
    assert parametrize.type_before_parametrizations(converted[1]) is bn_ext.BatchNorm2d
    assert list(converted.state_dict()) == list(original.state_dict())
    assert_same_training(converted, original, [torch.randn(4, 3, 5, 5) for _ in range(3)], tolerance=1e-5)
    weight = converted[1].weight
    parametrize.register_parametrization(converted[1], "bias", Softplus(), unsafe=True)  # one more afterwards
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(converted[1], name)
    assert type(converted[1]) is bn_ext.BatchNorm2d
    assert torch.equal(converted[1].weight, weight)
    assert type(bn_ext.revert(converted)[1]) is nn.BatchNorm2d


def test_parametrizations_are_reverted() -> None:
    model = bn_ext.convert(parametrized())
    bn_ext.revert(model)
    assert not any(isinstance(module, bn_ext.BatchNorm2d) for module in model.modules())
    weight = model[1].weight
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model[1].weight, weight)


def test_parametrized_subclasses_are_left_alone() -> None:
    module = Own(3)
    parametrize.register_parametrization(module, "weight", Softplus())
    kind = type(module)
    with pytest.warns(UserWarning, match="1 ParametrizedOwn"):
        assert type(bn_ext.convert(module)) is kind


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = bn_ext.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x, x)


def test_calls_with_a_residual_are_not_reverted() -> None:
    """In a graph, and in a model that holds it."""
    traced = torch.fx.symbolic_trace(Added())
    for model in (traced, nn.Sequential(traced)):
        with pytest.raises(ValueError, match="revert: bn is called with a residual or an activation"):
            bn_ext.revert(model)
    assert isinstance(traced.bn, bn_ext.BatchNorm2d)


def test_subclasses_of_ours_are_not_reverted() -> None:
    assert type(bn_ext.revert(nn.Sequential(OwnOfOurs(4)))[0]) is OwnOfOurs


def test_same_training(device: str) -> None:
    """A converted network trains as the original, with the optimizer made before."""
    torch.manual_seed(1)
    original = network().to(device)
    converted = copy.deepcopy(original)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (original, converted)]
    bn_ext.convert(converted)
    for _ in range(4):
        input = torch.randn(4, 3, 7, 7, device=device)
        for model, optimizer in zip((original, converted), optimizers, strict=True):
            optimizer.zero_grad()
            model(input).square().mul(torch.arange(25, device=device)).mean().backward()
            optimizer.step()
    torch.testing.assert_close(converted.state_dict(), original.state_dict())
    bn_ext.revert(converted).eval(), original.eval()
    torch.testing.assert_close(converted(input), original(input))


def test_state_dict_keys_are_unchanged() -> None:
    model = network()
    keys = list(model.state_dict())
    assert list(bn_ext.convert(model).state_dict()) == keys


def test_instance_forward_is_kept(device: str) -> None:
    """A forward set on the object, as offloading tools do, still wins."""
    module = nn.BatchNorm2d(3)
    module.forward = lambda input: input * 0 + 7
    assert bn_ext.convert(module)(torch.randn(2, 3, 4, 4)).eq(7).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_train_alike(name: str, device: str) -> None:
    network = NETWORKS[name]
    original = network.make().to(device).double()
    converted = bn_ext.convert(copy.deepcopy(original))
    inputs = [network.input(dtype=torch.float64, device=device) for _ in range(4)]
    assert_same_training(converted, original, inputs)
    reverted = bn_ext.revert(copy.deepcopy(converted))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in original.modules()]
    assert sum(isinstance(m, tuple(ours for _, ours in PAIRS)) for m in converted.modules()) == sum(
        isinstance(m, tuple(theirs for theirs, _ in PAIRS)) for m in original.modules()
    )


def test_hooks_of_every_kind_are_kept() -> None:
    module, seen = nn.BatchNorm2d(3), []

    def note(name: str) -> Callable[..., None]:
        return lambda *_, **__: seen.append(name)

    module.register_forward_pre_hook(note("forward pre"))
    module.register_forward_hook(note("forward"), with_kwargs=True)
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_state_dict_post_hook(note("state dict"))
    module.register_load_state_dict_pre_hook(note("load pre"))
    module.register_load_state_dict_post_hook(note("load"))
    removed = module.register_forward_hook(note("removed"))
    bn_ext.convert(module)
    removed.remove()
    module(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())
    assert seen == ["forward pre", "forward", "backward pre", "backward", "state dict", "load pre", "load"]


def test_hooks_that_make_the_weight_are_kept() -> None:
    """torch.nn.utils.prune keeps a mask beside the weight and multiplies the two in a pre-hook."""
    module = nn.BatchNorm2d(4)
    prune.l1_unstructured(module, "weight", amount=2)
    bn_ext.convert(module)
    silent = module(torch.randn(2, 4, 3, 3)).eq(0).all(-1).all(-1).all(0)
    assert torch.equal(silent, module.weight_mask == 0)
    assert silent.sum() == 2


def test_copied_and_pickled_after_conversion() -> None:
    model = bn_ext.convert(network())
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
        assert same[1] is same[3], "shared"
        input = torch.randn(2, 3, 5, 5)
        assert torch.equal(same.train()(input), copy.deepcopy(model).train()(input))


def test_devices_dtypes_and_training_flags_are_kept() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3, device="meta"), nn.BatchNorm2d(3).half().eval(), nn.BatchNorm2d(3, dtype=torch.bfloat16)
    )
    before = [(t.device, t.dtype, t.requires_grad) for t in (*model.parameters(), *model.buffers())]
    bn_ext.convert(model)
    assert [(t.device, t.dtype, t.requires_grad) for t in (*model.parameters(), *model.buffers())] == before
    assert [m.training for m in model] == [True, False, True]
    assert model[0](torch.randn(2, 3, 4, 4, device="meta")).is_meta


def test_inside_wrappers() -> None:
    wrapped = nn.DataParallel(network())
    norm = wrapped.module[1]
    assert type(bn_ext.convert(wrapped)) is nn.DataParallel
    assert wrapped.module[1] is norm
    assert type(norm) is bn_ext.BatchNorm2d


def test_an_attribute_of_one_s_own_stays() -> None:
    module = nn.BatchNorm2d(3)
    module.activation = "relu"
    assert type(bn_ext.convert(module)) is bn_ext.BatchNorm2d
    assert module.activation == "relu"
    assert module(torch.randn(2, 3, 4, 4)).min() < 0
