"""Batch norms become synchronized and what they were again. In one process they compute what they did."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import lookalikes
import pytest
import torch
import torch.distributed as dist
from lookalikes import homes as homes  # noqa: PLC0414
from lookalikes import trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bn_ext
from bn_ext import SyncBatchNorm

SHAPES = {"1d": (5, 3, 7), "2d": (5, 3, 2, 4), "3d": (5, 3, 2, 2, 2)}


def make(cls: type) -> nn.Module:
    return trained(cls(3))


def input_of(cls: type) -> Tensor:
    return torch.randn(SHAPES[cls.__name__[-2:]])


RANKED = [f"{name}{rank}d" for name in ("BatchNorm", "BatchNormAct") for rank in (1, 2, 3)]
CLASSES = [getattr(bn_ext, name) for name in RANKED] + [getattr(nn, f"BatchNorm{rank}d") for rank in (1, 2, 3)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: f"{cls.__module__.split('.')[0]}-{cls.__name__}")
def test_conversion(cls: type) -> None:
    """The same object with the same tensors and flags; the process group reaches every depth."""
    model = nn.Sequential(nn.Sequential(make(cls))).eval()
    module, before = model[0][0], {**model.state_dict(keep_vars=True)}
    twin, x, group = copy.deepcopy(model), input_of(cls), dist.ProcessGroup(0, 1)
    assert SyncBatchNorm.convert_sync_batchnorm(model, group, weighting="ranks") is model
    assert model[0][0] is module
    assert isinstance(module, SyncBatchNorm)
    assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
    assert (module.process_group, module.weighting, module.path, module.training) == (group, "ranks", "0.0", False)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is t for name, t in before.items())
    near = {} if cls.__module__.startswith("torch") else {"rtol": 0, "atol": 0}
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), twin.train(training)(x), **near)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), **near)
    assert "weighting=ranks" in repr(model) or "Act" in cls.__name__
    own = vars(copy.deepcopy(twin[0][0])).keys()
    copied = copy.deepcopy(model)
    assert copied[0][0].process_group is group
    assert SyncBatchNorm.revert_sync_batchnorm(model) is model
    assert type(module) is cls
    assert vars(module).keys() == own
    bn_ext.revert(copied)
    assert type(copied[0][0]) is (bn_ext.graph.conversion.classes.original(cls) or cls)


def test_constructor_of_torch() -> None:
    """One argument more, by name alone; no subclass; torch's state."""
    torchs, ours = inspect.signature(nn.SyncBatchNorm).parameters, inspect.signature(SyncBatchNorm).parameters
    by_position = [name for name, p in torchs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [*ours][: len(by_position)] == by_position
    assert all(ours[name].default == torchs[name].default for name in by_position)
    assert {name for name, p in ours.items() if name not in by_position and p.kind is p.KEYWORD_ONLY} == {"weighting"}
    for given in ({}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}):
        mine, theirs = SyncBatchNorm(3, **given), nn.SyncBatchNorm(3, **given)
        assert mine.load_state_dict(theirs.state_dict()) == ([], [])
        assert theirs.load_state_dict(mine.state_dict()) == ([], [])
    assert not issubclass(SyncBatchNorm, (nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(SyncBatchNorm(3)))[0].__class__ is SyncBatchNorm
    with pytest.raises(ValueError, match="weighting should be 'samples' or 'ranks', got 'values'"):
        SyncBatchNorm(3, weighting="values")
    assert bn_ext.revert(SyncBatchNorm(3)).__class__ is SyncBatchNorm  # made by its constructor
    assert bn_ext.convert(SyncBatchNorm(3)).__class__ is SyncBatchNorm


@pytest.mark.parametrize("converts", [False, True])
def test_others(converts: bool, homes: None) -> None:
    """timm's activation stays, in its synchronized classes too."""
    model = nn.Sequential(
        lookalikes.BatchNormAct2d(3, nn.SiLU()),
        nn.SyncBatchNorm(3),
        lookalikes.FrozenBatchNorm2d(3),
    )
    twin, x = copy.deepcopy(model), torch.randn(5, 3, 2, 4)
    classes = [type(module) for module in model]
    if converts:
        with pytest.warns(UserWarning, match="1 SyncBatchNorm"):
            bn_ext.convert(model)
    SyncBatchNorm.convert_sync_batchnorm(model)
    assert [isinstance(module, SyncBatchNorm) for module in model] == [True, True, False]
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), twin.train(training)(x))
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), twin(x))
    bn_ext.revert(again)
    assert [type(module) for module in again] == classes
    SyncBatchNorm.revert_sync_batchnorm(model)
    assert [type(module) is cls for module, cls in zip(model, classes)] == [not converts, True, not converts]
    assert model[0](x).min() < 0


def test_timms_synchronized_class(homes: None) -> None:
    module = lookalikes.SyncBatchNormAct(3)
    module.drop, module.act = nn.Identity(), nn.ReLU()
    twin, x = copy.deepcopy(module).eval(), torch.randn(5, 3, 2, 4)
    torch.testing.assert_close(SyncBatchNorm.convert_sync_batchnorm(module).eval()(x), twin(x))
    assert bn_ext.report(nn.Sequential(module)).rows[0].fused == "relu"
    module.process_group = group = dist.ProcessGroup(0, 1)
    assert type(bn_ext.revert(module)) is lookalikes.SyncBatchNormAct
    assert module.process_group is group


def test_what_is_left() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    kinds = [Own(3), bn_ext.nn.GhostBatchNorm2d(3), bn_ext.nn.SharedBatchNorm2d(4, 2), bn_ext.nn.BatchNormLast(3)]
    model = nn.Sequential(*kinds, nn.InstanceNorm2d(3), bn_ext.BatchNorm2d(3))
    with pytest.warns(UserWarning, match=r"left unsynchronized: 1 Own .*1 GhostBatchNorm2d .*Shared.*Last"):
        SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(module) for module in model[:4]] == [type(kind) for kind in kinds]
    lazy = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="1 is not initialized"):
        SyncBatchNorm.convert_sync_batchnorm(lazy)
    assert type(lazy[0]) is nn.BatchNorm2d
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module"):
        SyncBatchNorm.convert_sync_batchnorm(lambda x: x)


def test_frozen_and_adapted() -> None:
    """They stay so, and revert refuses them as it does others."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    bn_ext.train.freeze(model)
    SyncBatchNorm.convert_sync_batchnorm(model)
    assert model[0].frozen
    with pytest.raises(ValueError, match="0 is frozen"):
        bn_ext.revert(model)
    assert type(model[0]) is SyncBatchNorm
    bn_ext.train.unfreeze(model)
    bn_ext.train.adapt(model, 0.5)
    with pytest.raises(ValueError, match="0 is adapted"):
        bn_ext.revert(model)
    bn_ext.train.adapt(model, 1)
    assert type(bn_ext.revert(model)[0]) is nn.BatchNorm2d


def test_parametrized() -> None:
    module = parametrizations.weight_norm(nn.BatchNorm1d(3), dim=None)
    twin, x = copy.deepcopy(module), torch.randn(5, 3)
    SyncBatchNorm.convert_sync_batchnorm(module)
    torch.testing.assert_close(copy.deepcopy(module)(x), twin(x))
    bn_ext.revert(module)
    assert isinstance(module, nn.BatchNorm1d)
    torch.testing.assert_close(module(x), twin(x))


def test_weights_go_between_classes() -> None:
    plain = make(nn.BatchNorm2d)
    sync = SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(3))
    assert sync.load_state_dict(plain.state_dict()) == ([], [])
    assert nn.BatchNorm2d(3).load_state_dict(sync.state_dict()) == ([], [])
    x = torch.randn(5, 3, 2, 4)
    torch.testing.assert_close(sync.eval()(x), plain.eval()(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), trained(nn.BatchNorm2d(4)), nn.ReLU(), trained(bn_ext.BatchNormAct2d(4)))


def test_evaluation_elsewhere() -> None:
    """Folded, scripted, exported, under torch.func and traced, in evaluation."""
    plain, sync = network().eval(), SyncBatchNorm.convert_sync_batchnorm(network()).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = plain(x)
    folded = bn_ext.fold(sync, x)
    assert not any(isinstance(module, SyncBatchNorm) for module in list(folded.modules())[:3])
    computed: dict[str, Any] = {
        "folded": folded,
        "folded without inputs": bn_ext.fold(sync),
        "scripted": torch.jit.script(sync),
        "traced": torch.jit.trace(sync, x),
        "symbolically traced": torch.fx.symbolic_trace(sync),
        "exported": torch.export.export(sync, (x,)).module(),
        "functional": lambda x: torch.func.vmap(sync)(x[None])[0],
        "compiled": torch.compile(sync, backend="aot_eager", fullgraph=True),
        "fused": bn_ext.fuse(copy.deepcopy(sync)),
    }
    for name, model in computed.items():
        torch.testing.assert_close(model(x), expected, msg=lambda text, name=name: f"{name}: {text}")
    names = {node.target for node in torch.export.export(sync, (x,)).graph.nodes if node.op == "call_function"}
    assert not any("bn_ext" in str(name) for name in names)
    with pytest.raises(torch.jit.Error, match="TorchScript has no form of SyncBatchNorm in training"):
        torch.jit.script(SyncBatchNorm(3).train())(torch.randn(2, 3))


def test_fused_model() -> None:
    """What was fused stays right: the class that the captured code expects is another one now."""
    fused = bn_ext.fuse(network())
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(fused(x), network()(x))
    SyncBatchNorm.convert_sync_batchnorm(fused)
    torch.testing.assert_close(fused.eval()(x), trainless(fused, x))
    bn_ext.revert(fused)
    assert type(fused[1]) is nn.BatchNorm2d


def trainless(model: nn.Module, x: Tensor) -> Tensor:
    plain = network().eval()
    plain.load_state_dict(model.state_dict())
    return plain(x)


def test_report_and_diagnosis() -> None:
    model = SyncBatchNorm.convert_sync_batchnorm(network())
    rows = bn_ext.report(model).rows
    assert [(row.path, row.cls, row.runs_on, row.fused) for row in rows] == [
        ("1", "SyncBatchNorm", "bn_ext", ""),
        ("3", "SyncBatchNormAct", "bn_ext", "relu"),
    ]
    bn_ext.train.diagnose(model, example=torch.randn(2, 3, 6, 6))


def test_no_group_is_a_plain_batch_norm() -> None:
    sync, plain = SyncBatchNorm(3, dtype=torch.float64), bn_ext.BatchNorm1d(3, dtype=torch.float64)
    x, residual = torch.randn(2, 5, 3, 7, dtype=torch.float64)
    for given in ({}, {"residual": residual, "activation": "relu"}, {"lengths": torch.arange(1, 6)}):
        assert torch.equal(sync(x, **given), plain(x, **given))
    torch.testing.assert_close(sync.state_dict(), plain.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        sync(x[:1, :, 0])
