"""Synchronized batch norm within training: DistributedDataParallel, fully_shard, the helpers of bn_ext.train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import collectives, in_each_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bn_ext
from bn_ext import SyncBatchNorm

N = 7


def network() -> nn.Module:
    """The same one in every process."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        bn_ext.BatchNormAct2d(4),
        nn.Flatten(),
    )
    return nn.Sequential(*layers).double()


def synchronized() -> nn.Module:
    return SyncBatchNorm.convert_sync_batchnorm(network())


def batch(step: int) -> Tensor:
    return torch.randn(N, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def mine(whole: Tensor) -> Tensor:
    return whole.tensor_split(dist.get_world_size())[dist.get_rank()]  # 7 images: parts of different sizes


def loss(y: Tensor) -> Tensor:
    """Its sum over ranks is the loss of the whole batch, times the ranks, by which DDP divides."""
    return y.square().mul(torch.linspace(-1, 2, y.size(1), dtype=y.dtype)).sum() / N


def train(model: nn.Module, part: Callable[[Tensor], Tensor], factor: float = 1, steps: int = 3) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        (loss(model(part(batch(step)))) * factor).backward()
        optimizer.step()
    return {name.removeprefix("module."): t for name, t in model.state_dict().items()}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def _wrapped() -> None:
    expected = train(network(), lambda t: t)
    for options in ({}, {"broadcast_buffers": False}, {"static_graph": True}):
        wrapped = DistributedDataParallel(synchronized(), **options)
        close(train(wrapped, mine, dist.get_world_size()), expected)
    sharded = synchronized()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (sharded[1], sharded[4], sharded):
        fully_shard(module, mesh=mesh)
    state = train(sharded, mine, dist.get_world_size())
    close({name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}, expected)


def _accumulated() -> None:
    """Batch norms meet under no_sync too; the gradients do in the last backward."""
    whole, wrapped = network(), DistributedDataParallel(synchronized(), broadcast_buffers=False)
    for step in range(2):
        loss(whole(batch(step))).backward()
    with wrapped.no_sync(), collectives(4):
        (loss(wrapped(mine(batch(0)))) * dist.get_world_size()).backward()
    (loss(wrapped(mine(batch(1)))) * dist.get_world_size()).backward()
    gradients = {name: p.grad for name, p in wrapped.module.named_parameters()}
    close(gradients, {name: p.grad for name, p in whole.named_parameters()})


def _evaluation_in_training() -> None:
    """One rank evaluates alone, between two steps."""
    wrapped = DistributedDataParallel(synchronized())
    train(wrapped, mine, steps=1)
    if dist.get_rank() == 0:
        wrapped.eval()
        with torch.no_grad():
            wrapped.module(batch(0))
        wrapped.train()
    train(wrapped, mine, steps=1)


def _mixed_precision() -> None:
    model, whole = synchronized().float(), network().float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[1], model[4], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    x = batch(0).float()
    y = model(mine(x))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), mine(whole(x)), rtol=0.1, atol=0.1)
    torch.testing.assert_close(model[1].running_var, whole[1].running_var, rtol=0.05, atol=0.01)


def _fused() -> None:
    """Converted after it was fused and run, and fused after it was converted."""
    expected = train(network(), lambda t: t, steps=2)
    first, last = bn_ext.fuse(network()), bn_ext.fuse(synchronized())
    first(mine(batch(0)))
    first.load_state_dict(network().state_dict())
    for model in (SyncBatchNorm.convert_sync_batchnorm(first), last):
        close(train(DistributedDataParallel(model), mine, dist.get_world_size(), steps=2), expected)


def _join() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(synchronized())
    done = 0
    message = "Detected at least one rank" if rank else f"Rank {rank} exhausted all inputs"
    with pytest.raises(RuntimeError, match=message), wrapped.join(throw_on_early_termination=True):
        for step in range(2 if rank == 0 else 4):
            loss(wrapped(mine(batch(step)))).backward()
            done += 1
    assert done == 2
    other = DistributedDataParallel(synchronized())
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm 1 of 8 channels .* with an empty batch"), other.join():
        other(mine(batch(0)))
    empty = DistributedDataParallel(synchronized())  # which is what the error recommends
    for step in range(3):
        x = batch(step)[: 2 * (ranks - 1)]
        x = x[:0] if rank == 0 else x[2 * (rank - 1) : 2 * rank]
        loss(empty(x)).backward()


def _several_groups() -> None:
    """One model with a group of all and groups of halves; each as a process with the batch of its group."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    halves = [[r for r in range(ranks) if r % 2 == half] for half in range(2)]
    groups = [dist.new_group(half) for half in halves]
    own = halves[rank % 2]
    torch.manual_seed(0)
    x = torch.randn(2 * ranks, 5, dtype=torch.float64)
    of_all, of_half = (bn_ext.BatchNorm1d(5, dtype=torch.float64) for _ in range(2))
    model = nn.Sequential(
        SyncBatchNorm(5, dtype=torch.float64),
        SyncBatchNorm(5, process_group=groups[rank % 2], dtype=torch.float64),
    )
    y = of_all(x).chunk(ranks)
    expected = of_half(torch.cat([y[r] for r in own])).chunk(len(own))[own.index(rank)]
    close(model(x.chunk(ranks)[rank]), expected)
    assert copy.deepcopy(model)[1].process_group is groups[rank % 2]


def _helped() -> None:
    """By the other helpers of bn_ext.train."""
    rank = dist.get_rank()
    x = mine(batch(0)).clone()
    model = synchronized()
    model(x)
    before = copy.deepcopy(model.state_dict())
    with bn_ext.train.keep_statistics(model), collectives(2):
        model(x)
    close(model.state_dict(), before)
    spoiled = x.clone()
    if rank == 0:
        spoiled[0, 0, 0, 0] = float("inf")  # in one rank: all of them skip it
    with bn_ext.train.skip_nonfinite(model), collectives(2):
        model(spoiled)
    close(model.state_dict(), before)
    with collectives(0):
        bn_ext.train.adapt(model, 0.5)
        adapted = model.eval()(x)
        bn_ext.train.adapt(model, 1)
        assert not torch.equal(adapted, model(x))
        bn_ext.train.freeze(model)
        assert torch.equal(model.train()(x), model.eval()(x))
    assert type(model[1]) is SyncBatchNorm
    SyncBatchNorm.convert_sync_batchnorm(model)
    assert model[1].frozen
    bn_ext.train.unfreeze(model.train())
    with collectives(2):
        model(x)
    wrapped = DistributedDataParallel(model)
    found = bn_ext.train.diagnose(wrapped, example=x)
    assert not [finding for finding in found if "not synchronized" in finding.what]


def _recalibrated() -> list[dict[str, Tensor]]:
    states = []
    for sequential in (False, True):
        model = synchronized()
        with pytest.raises(ValueError, match="different numbers of batches"):
            bn_ext.train.recalibrate(model, [mine(batch(0))] * (1 + dist.get_rank()), sequential, progress=False)
        assert not model[1].running_mean.any()
        bn_ext.train.recalibrate(model, [mine(batch(step)) for step in range(3)], sequential, progress=False)
        states.append(model.state_dict())
    return states


JOBS = (_wrapped, _accumulated, _evaluation_in_training, _mixed_precision, _several_groups, _helped, _fused, _join)


def _jobs() -> list[dict[str, Tensor]]:
    for job in JOBS:
        try:
            job()
        except BaseException as error:
            raise AssertionError(job.__name__) from error
    return _recalibrated()


def test_training(tmp_path: Path) -> None:
    for states in in_each_of(2, tmp_path, _jobs):
        for sequential, state in zip((False, True), states, strict=True):
            whole = network()
            bn_ext.train.recalibrate(whole, [batch(step) for step in range(3)], sequential, progress=False)
            close(state, whole.state_dict())
            assert state["1.num_batches_tracked"] == 3
