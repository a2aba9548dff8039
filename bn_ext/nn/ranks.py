"""The processes of a group, and how they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parallel import DistributedDataParallel

from bn_ext._processes import in_group

_HINT = (
    "every process of the group has to call the same SyncBatchNorm layers in the same order, forward and backward, "
    "with an empty batch where it has no data"
)
_DIFFERS = "bn_ext/differs"


class Ranks(NamedTuple):
    """The processes of a group."""

    group: str  # its name, as functional collectives take it
    number: int
    mine: int  # the rank of this process in the group
    by_host: bool = False  # whether tensors go by the host, because the backend may not take them where they are

    def gathered(self, packed: Tensor, layer: str) -> Tensor:
        """A row from each process, in the order of ranks."""
        rows = self._met(torch.ops._c10d_functional.all_gather_into_tensor, packed, self.number, layer, "forward")
        return rows.view(self.number, -1)

    def summed(self, packed: Tensor, layer: str) -> Tensor:
        """The sum over all processes."""
        return self._met(torch.ops._c10d_functional.all_reduce, packed, "sum", layer, "backward")

    def _met(self, collective: Callable[..., Tensor], packed: Tensor, how: Any, layer: str, direction: str) -> Tensor:
        given = packed.cpu() if self.by_host else packed
        if is_compiling():  # where an exception cannot be caught
            return torch.ops._c10d_functional.wait_tensor(collective(given, how, self.group))
        try:
            return torch.ops._c10d_functional.wait_tensor(collective(given, how, self.group)).to(packed.device)
        except RuntimeError as error:
            reasons = [reason for reason in (_note(self.group), _HINT) if reason]
            raise RuntimeError(
                f"bn_ext: {layer}, {direction}: the {self.number} processes of its group did not meet: "
                f"{'; '.join(reasons)} ({error})"
            ) from error


ALONE = Ranks("", 1, 0)


def ranks_of(group: Any, device: torch.device | None = None) -> Ranks:
    """The processes of a group, or of all if it is None, for tensors on a device.

    Raises:
        ValueError: this process is not in the group.
    """
    if not in_group():
        return ALONE
    group = dist.group.WORLD if group is None else group
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("SyncBatchNorm: this process is not in its process_group")
    elsewhere = device is not None and device.type != "cpu" and not is_compiling()
    by_host = elsewhere and dist.get_backend(group) == dist.Backend.GLOO
    return Ranks(group.group_name, group.size(), group.rank(), by_host)


# Of each group, the numbers of first calls, and the layers that were called.
_CAME: WeakKeyDictionary[Any, tuple[Iterator[int], WeakSet[nn.Module]]] = WeakKeyDictionary()


def agree(module: nn.Module, layer: str, ranks: Ranks) -> None:
    """Sees, when a layer is called for the first time, whether other processes come with another one.

    Tensors of other sizes would end processes under gloo, whose threads throw an exception that nobody can catch. The
    store in which the group's processes found each other says what came first, in place of another collective. With
    TORCH_DISTRIBUTED_DEBUG=DETAIL every call waits there for all processes: torch compares no gathering of tensors.

    Raises:
        ValueError: another process called another layer. Without DETAIL, those that call what came first get an error
            after the group's timeout.
    """
    group = dist.distributed_c10d._resolve_process_group(ranks.group)  # type: ignore[arg-type]
    numbers, layers = _CAME.setdefault(group, (count(), WeakSet()))
    in_detail = dist.get_debug_level() == dist.DebugLevel.DETAIL
    if module in layers and not in_detail:
        return
    call = f"bn_ext/{next(numbers)}"
    differs = ""
    try:
        store = group.get_group_store()
        if in_detail:
            store.set(f"{call}/{ranks.mine}", layer)
            others = [store.get(f"{call}/{rank}") for rank in range(ranks.number)]
        else:
            others = [store.compare_set(call, "", layer)]
        for other in (one.decode() for one in others):
            if other != layer:
                differs = f"rank {ranks.mine} of the group came with {layer} where another came with {other}"
                store.set(_DIFFERS, differs)
                break
    except (RuntimeError, NotImplementedError):  # a store without such methods, or a process that does not come
        return
    if differs:
        raise ValueError(f"bn_ext: {differs}: {_HINT}")
    layers.add(module)


def _note(group: str) -> str:
    """What a process said that came with another layer than the others."""
    try:
        store = dist.distributed_c10d._resolve_process_group(group).get_group_store()  # type: ignore[arg-type]
        return store.get(_DIFFERS).decode() if store.check([_DIFFERS]) else ""
    except (RuntimeError, NotImplementedError):
        return ""


def check_join(layer: str) -> None:
    """Raises RuntimeError in a context of DistributedDataParallel's join in which a process may stay away."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    config = None if wrapper is None else wrapper._join_config
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            f"bn_ext: {layer} in DistributedDataParallel.join(): a process that has no more batches would be waited "
            "for: have it call the model with an empty batch, which takes part in every collective, or join with "
            "throw_on_early_termination=True"
        )
