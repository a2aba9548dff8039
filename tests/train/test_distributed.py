"""Several processes, a batch each: DistributedDataParallel and fully_shard."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from modules import PREPARATIONS
from networks import NETWORKS, assert_same_training
from processes import in_each_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bn_ext

RANKS = 2


# ---------------------------------------------------------------------------------------------- as torch's


def _data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _sharded(model: nn.Module, **options) -> nn.Module:
    """Batch norms apart from the rest, as their parameters may be of other types."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _train_as_torchs(name: str, ways: Iterable[tuple[Callable, Callable]]) -> None:
    inputs, network = torch.Generator().manual_seed(dist.get_rank()), NETWORKS[name]
    for prepare, wrapped in ways:
        torch.manual_seed(0)
        theirs = network.make().double()
        mine = prepare(copy.deepcopy(theirs))
        batches = [network.input(n, dtype=torch.float64, generator=inputs) for n in (4, 3)]
        assert_same_training(wrapped(mine), wrapped(theirs), batches)


def _train_in_bfloat16() -> None:
    """Sharded, with parameters cast for each call: torch's CPU kernel refuses these beside float32 statistics."""
    network = NETWORKS["resnet18"]
    plain = network.make()
    for prepare in PREPARATIONS:
        model = prepare(copy.deepcopy(plain))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        _sharded(model, mp_policy=policy)
        input = network.input()
        output, expected = model(input), plain(input)
        output.float().square().sum().backward()
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=0.1, atol=0.05)


def _jobs() -> None:
    wrappers = _data_parallel, _sharded
    if dist.get_world_size() == 1:
        _train_as_torchs("resnet18", zip(PREPARATIONS, wrappers, strict=True))
    else:
        _train_as_torchs("resnet18", product(PREPARATIONS, wrappers))
        _train_as_torchs("unet3d", zip(PREPARATIONS, wrappers, strict=True))
        _train_in_bfloat16()


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_networks_train_as_torchs(ranks: int, tmp_path: Path) -> None:
    in_each_of(ranks, tmp_path, _jobs)


# ---------------------------------------------------------------------------------------------- two forwards


def network() -> nn.Module:
    """The same one in every process."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
    return bn_ext.convert(nn.Sequential(*layers))


def _inputs(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(3 + rank, 3, 7, 7, generator=generator) for _ in range(2)]


def _gradients(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Of one loss over two forwards, the second time."""
    for _ in range(2):
        model.zero_grad()
        sum(model(x).square().mul(torch.arange(5)).mean() for x in inputs).backward()
    return [p.grad for p in model.parameters()]


def _two_forwards() -> tuple[list[Tensor], dict[str, Tensor]]:
    model = network()
    return _gradients(DistributedDataParallel(model), _inputs(dist.get_rank())), model.state_dict()


def test_two_forwards_under_ddp(tmp_path: Path) -> None:
    """DDP writes rank 0's buffers over everyone's before each forward; the backward of both must not mind."""
    ranks = in_each_of(RANKS, tmp_path, _two_forwards)
    torch.set_num_threads(1)  # as the workers: the convolution's bits depend on it
    alone = []
    for rank in range(RANKS):
        model = network()
        alone.append((_gradients(model, _inputs(rank)), model.state_dict()))
    mean = [sum(gs) / RANKS for gs in zip(*(gradients for gradients, _ in alone), strict=True)]
    for gradients, _ in ranks:
        torch.testing.assert_close(gradients, mean)
    assert all(map(torch.equal, ranks[0][1].values(), alone[0][1].values())), "rank 0's statistics are its own"
    assert ranks[1][1]["1.num_batches_tracked"].item() == 4


# ---------------------------------------------------------------------------------------------- outputs made again


def _each_block_sharded(model: nn.Module) -> nn.Module:
    """The parameters of a block are away while the next one's backward makes the block's output again."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.children():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _outputs_made_again() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3), bn_ext.BatchNormAct2d(4)) for _ in range(4)]
    plain = nn.Sequential(*blocks, nn.Conv2d(4, 2, 1))
    inputs = torch.Generator().manual_seed(dist.get_rank())
    batches = [torch.randn(n, 4, 12, 12, generator=inputs) for n in (4, 3)]
    for wrapped in (_data_parallel, _each_block_sharded):
        kept, again = copy.deepcopy(plain), bn_ext.train.recompute_outputs(copy.deepcopy(plain))
        assert_same_training(wrapped(again), wrapped(kept), batches, tolerance=0)


def test_outputs_made_again(tmp_path: Path) -> None:
    in_each_of(RANKS, tmp_path, _outputs_made_again)
