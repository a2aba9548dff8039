"""The processes of a group, and how they meet."""

from __future__ import annotations

from collections.abc import Callable
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
    "with an empty batch where it has no data; under find_unused_parameters, where DistributedDataParallel may reduce "
    "in another order in each process, in a process_group of their own"
)


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
            reasons = [reason for reason in (_note(self), _HINT) if reason]
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


class _Meetings:
    """The calls in a group, as its processes note them in the store in which they found each other."""

    def __init__(self, group: Any) -> None:
        self.store = group.get_group_store()
        # A store may outlive a group. Each process comes once.
        self.prefix = f"bn_ext/{(self.store.add('bn_ext/came', 1) - 1) // group.size()}"
        self.layers: WeakSet[nn.Module] = WeakSet()  # that were called
        self.calls = 0

    def first(self, layer: str, place: int) -> list[bytes]:
        """The layer of whoever came first to a place among the group's collectives."""
        return [self.store.compare_set(f"{self.prefix}/{place}", "", layer)]

    def all(self, layer: str, ranks: Ranks) -> list[bytes]:
        """The layers of all processes, in a call that each of them makes."""
        self.calls += 1
        self.store.set(f"{self.prefix}/call {self.calls}/{ranks.mine}", layer)
        found = [self.store.get(f"{self.prefix}/call {self.calls}/{rank}") for rank in range(ranks.number)]
        if self.calls > 1:  # all processes have come to this call, so none will read what was said in the one before
            self.store.delete_key(f"{self.prefix}/call {self.calls - 1}/{ranks.mine}")
        return found


_MEETINGS: WeakKeyDictionary[Any, _Meetings] = WeakKeyDictionary()


def _group_of(ranks: Ranks) -> Any:
    return dist.distributed_c10d._resolve_process_group(ranks.group)  # type: ignore[arg-type]


def agree(module: nn.Module, layer: str, ranks: Ranks) -> None:
    """Sees, when a layer is called for the first time, whether other processes come with another one.

    Tensors of other sizes would end processes under gloo, whose threads throw an exception that nobody can catch. The
    group's store says what came first, in place of another collective: by how many collectives the group has made,
    which is the same in all processes. With TORCH_DISTRIBUTED_DEBUG=DETAIL every forward waits there for all processes:
    torch compares no gathering of tensors.

    Raises:
        ValueError: another process called another layer. Without DETAIL, those that call what came first get an error
            after the group's timeout.
    """
    group = _group_of(ranks)
    in_detail = dist.get_debug_level() == dist.DebugLevel.DETAIL
    try:
        if (meetings := _MEETINGS.get(group)) is None:
            meetings = _MEETINGS[group] = _Meetings(group)
        if in_detail:
            others = meetings.all(layer, ranks)
        elif module not in meetings.layers:
            others = meetings.first(layer, group._get_sequence_number_for_group())
        else:
            return
        differing = next((other for one in others if (other := one.decode()) != layer), None)
        if differing is None:
            meetings.layers.add(module)
            return
        differs = f"rank {ranks.mine} of the group came with {layer} where another came with {differing}"
        meetings.store.set(f"{meetings.prefix}/differs", differs)
    except (RuntimeError, NotImplementedError):  # a store without such methods, or a process that does not come
        return
    raise ValueError(f"bn_ext: {differs}: {_HINT}")


def _note(ranks: Ranks) -> str:
    """The error of a process that came with another layer than the others; empty if none did."""
    try:
        meetings = _MEETINGS[_group_of(ranks)]
        key = f"{meetings.prefix}/differs"
        return meetings.store.get(key).decode() if meetings.store.check([key]) else ""
    except (KeyError, RuntimeError, NotImplementedError):
        return ""


def check_group(group: Any) -> None:
    """Raises TypeError for what is no process group."""
    known = None, dist.GroupMember.NON_GROUP_MEMBER if dist.is_available() else None
    if group not in known and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"process_group should be a torch.distributed.ProcessGroup or None, got {group!r}")


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
