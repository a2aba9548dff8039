"""Synchronized batch norm where processes differ, come late or do not come, and where something cannot follow it."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import collectives, in_each_of
from torch import nn

import bn_ext
from bn_ext import SyncBatchNorm
from bn_ext.nn import ranks

C = 6
PATIENCE = 2.0


def _group(patience: float = PATIENCE) -> dist.ProcessGroup:
    """A new one, because one in which a collective failed is of no more use. Both processes come from here at once."""
    group = dist.new_group(timeout=timedelta(seconds=patience))
    dist.barrier()
    return group


@contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    before = [t.clone() for module in modules for t in module.state_dict().values()]
    yield
    assert all(map(torch.equal, before, (t for module in modules for t in module.state_dict().values())))


def _alone(call: Callable[[], Any], names: str) -> None:
    """The call of the only process that comes: it waits for the others no longer than the group's timeout."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=names) as caught:
        call()
    assert "did not meet" in str(caught.value)
    assert time.monotonic() - start < PATIENCE + 20


def _other_channels() -> None:
    sync = SyncBatchNorm(C + dist.get_rank(), process_group=_group())
    x = torch.randn(3, sync.num_features)
    _one_differs([sync], lambda: sync(x), f"of {C} channels", f"of {C + 1} channels")


def _other_order() -> None:
    model = nn.ModuleDict({"one": nn.BatchNorm1d(C), "two": nn.BatchNorm1d(C)})
    SyncBatchNorm.convert_sync_batchnorm(model, _group())
    first = model[["one", "two"][dist.get_rank()]]
    _one_differs([*model.values()], lambda: first(torch.randn(3, C)), "SyncBatchNorm one", "SyncBatchNorm two")


def _one_differs(modules: list[nn.Module], call: Callable[[], Any], *layers: str) -> None:
    """Who comes last gets the error at once, the other one after the timeout, and both errors name both layers."""
    with unchanged(*modules):
        if dist.get_rank() == 1:
            time.sleep(PATIENCE / 3)
            with pytest.raises(
                ValueError, match=f"rank 1 .* with .*{layers[1]}.* where another came with .*{layers[0]}"
            ):
                call()
        else:
            _alone(call, f"{layers[0]}.*{layers[1]}.* where another came with .*{layers[0]}")


def _other_order_later() -> None:
    """Layers that have been called before meet others of the same sizes: every process finds out."""
    model = nn.ModuleDict({"one": nn.BatchNorm1d(C), "two": nn.BatchNorm1d(C)})
    SyncBatchNorm.convert_sync_batchnorm(model, _group(60))
    x = torch.randn(3, C)
    model["two"](model["one"](x))
    first = model[["one", "two"][dist.get_rank()]]
    with unchanged(model), pytest.raises(RuntimeError, match="came with other layers"):
        first(x)
    x.requires_grad_()
    outputs = [module(x) for module in model.values()]
    with pytest.raises(RuntimeError, match=r"backward: .* came with other layers"):
        outputs[dist.get_rank()].sum().backward()


def _other_channels_in_detail() -> None:
    """With TORCH_DISTRIBUTED_DEBUG=DETAIL every process gets the error at once."""
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = _group(60)
        sync = SyncBatchNorm(C + dist.get_rank(), process_group=group)
        start = time.monotonic()
        with unchanged(sync), pytest.raises(ValueError, match=f"came with .* of {sync.num_features} channels where"):
            sync(torch.randn(3, sync.num_features))
        assert time.monotonic() - start < 30
    finally:
        dist.set_debug_level(before)


def _other_weighting() -> None:
    sync = SyncBatchNorm(C, process_group=_group(60), weighting=["samples", "ranks"][dist.get_rank()])
    with unchanged(sync), pytest.raises(RuntimeError, match="came with other layers"):
        sync(torch.randn(3, C))


def _late() -> None:
    model = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(C)), _group())
    x = torch.randn(3, C, requires_grad=True)
    y = model(x)
    with unchanged(model):
        if dist.get_rank() == 0:
            _alone(y.sum().backward, "SyncBatchNorm 0 of 6 channels, backward: the 2 processes")
        else:
            time.sleep(PATIENCE * 2)
            _alone(y.sum().backward, "SyncBatchNorm 0 of 6 channels, backward")
        _alone(lambda: model(x), "SyncBatchNorm 0 of 6 channels, forward")


def _killed() -> None:
    """In mid-step, between forward and backward."""
    model = SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C)))
    y = model(torch.randn(3, C))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with unchanged(model):
        _alone(y.sum().backward, "SyncBatchNorm 1 of 6 channels, backward")
        _alone(lambda: model(torch.randn(3, C)), "SyncBatchNorm 1 of 6 channels, forward")


def _not_a_member() -> None:
    group = dist.new_group([0])
    sync = SyncBatchNorm(C, process_group=group)
    if dist.get_rank() == 0:  # a group of one process
        torch.testing.assert_close(
            sync(torch.arange(12.0).view(2, C)), bn_ext.BatchNorm1d(C)(torch.arange(12.0).view(2, C))
        )
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            sync(torch.randn(1, C))
    else:
        with pytest.raises(ValueError, match="this process is not in its process_group"):
            sync(torch.randn(2, C))


def _refused_before_anyone_waits() -> None:
    sync, sync_of_halves = SyncBatchNorm(C), SyncBatchNorm(C, dtype=torch.float16)
    x = torch.randn(3, C)
    refused = [
        (ValueError, "expected at least 2D input", lambda: sync(x[0])),
        (RuntimeError, f"should contain {C - 1} elements not {C}", lambda: sync(x[:, 1:])),
        (NotImplementedError, "", lambda: sync(x.long())),
        (RuntimeError, "expected weight of type torch.float64 for an input of", lambda: sync(x.double())),
        (RuntimeError, "expected weight of type .*, got torch.float16", lambda: sync_of_halves(x)),
        (RuntimeError, r"residual of sizes \[3, 9\] for an input of", lambda: sync(x, torch.randn(3, 9))),
        (ValueError, "expected a mask of sizes", lambda: sync(x, mask=torch.ones(2))),
        (ValueError, "eps must be positive", lambda: SyncBatchNorm(C, eps=0.0)(x)),
        (ValueError, "unknown activation|activation should be", lambda: sync(x, activation="none")),
        (RuntimeError, "has no torch.func transforms", lambda: torch.func.grad(lambda x: sync(x).sum())(x)),
        (RuntimeError, "has no torch.func transforms", lambda: torch.func.vmap(sync)(x[None])),
        (RuntimeError, "has no torch.func transforms", lambda: torch.jit.trace(sync, x)),
        (RuntimeError, r"call eval\(\) first", lambda: torch.export.export(sync, (x,))),
    ]
    with unchanged(sync), collectives(0):
        for error, message, call in refused:
            with pytest.raises(error, match=message):
                call()


def _errors() -> None:
    behaviours = (
        _not_a_member,
        _refused_before_anyone_waits,
        _other_channels,
        _other_order,
        _other_order_later,
        _other_weighting,
        _other_channels_in_detail,
        _late,
        _killed,
    )
    for behaviour in behaviours:
        try:
            behaviour()
        except BaseException as error:
            raise AssertionError(behaviour.__name__) from error


def test_errors(tmp_path: Path) -> None:
    in_each_of(2, tmp_path, _errors, patience=60, lost=[1])


class Group:
    """As one process sees a group of two, in which it has made so many collectives."""

    def __init__(self, store: dist.Store) -> None:
        self.store, self.made = store, 0

    def get_group_store(self) -> dist.Store:
        return self.store

    def size(self) -> int:
        return 2

    def _get_sequence_number_for_group(self) -> int:
        return self.made


def test_layers_are_compared_where_they_are_called_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()

    def call(group: Group, module: nn.Module, layer: str) -> None:
        monkeypatch.setattr(ranks, "_group_of", lambda _: group)
        ranks.agree(module, layer, ranks.Ranks("", 2, 0))
        group.made += 1

    one, other = groups = Group(store), Group(store)
    module = nn.Identity()
    for group in groups:
        call(group, module, "a")
    call(one, module, "a")
    call(other, copy.deepcopy(module), "a")  # a copy is called for the first time: it meets nobody
    for group in groups:
        call(group, nn.Identity(), "b")
    call(one, nn.Identity(), "c")
    with pytest.raises(ValueError, match="came with d where another came with c"):
        call(other, nn.Identity(), "d")
    for group in (Group(store), Group(store)):  # the next groups of a store
        call(group, nn.Identity(), "e")


def test_groups_are_groups() -> None:
    for call in (
        lambda: SyncBatchNorm(3, process_group=[0, 1]),
        lambda: SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3), [0, 1]),
    ):
        with pytest.raises(TypeError, match=r"process_group should be .*, got \[0, 1\]"):
            call()
