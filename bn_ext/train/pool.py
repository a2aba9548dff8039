"""The moments of the inputs of batch norms, as their calls give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bn_ext import activation as activations
from bn_ext._processes import in_group
from bn_ext.functional import finished
from bn_ext.nn.composed import move_statistics
from bn_ext.nn.ranks import ranks_of
from bn_ext.nn.sync import SyncBatchNorm
from bn_ext.stages import Moments, stats
from bn_ext.train.calls import arguments

_MOVED = ("moments", "running_mean", "running_var")


class StopError(Exception):
    """The forward has given what was wanted of it."""


class Pool:
    """The moments of all inputs of one batch norm so far, and the number of its calls."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        mean = module._buffers["running_mean"]
        assert mean is not None
        nothing = torch.zeros_like(mean, dtype=torch.float64)
        self.moments = Moments(nothing.new_zeros(()), nothing, nothing)
        self.calls = 0
        # Every process of a synchronized batch norm gets the moments of all: the first one adds them, for all.
        self.adds = not isinstance(module, SyncBatchNorm) or ranks_of(module.process_group).mine == 0

    def add(self, moments: Moments) -> None:
        if self.adds:
            self.calls += 1
            self.moments = _merged([self.moments, Moments(*moments[:3])])

    def gathered(self) -> Pool:
        """This pool and those of all other processes, in their order."""
        if not in_group():
            return self
        device = torch.device("cpu") if dist.get_backend() == "gloo" else self.moments.mean.device
        mine = torch.cat([part.reshape(-1) for part in (self.moments.counts.new_tensor(self.calls), *self.moments)])
        everyones = [torch.empty_like(mine, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, mine.to(device))
        pool = Pool(self.path, self.module)
        pool.calls = sum(int(one[0]) for one in everyones)
        rows = [one.to(mine.device)[1:] for one in everyones]
        pool.moments = _merged([Moments(row[0], *row[1:].chunk(2)) for row in rows])
        return pool


def _merged(rows: Iterable[Moments]) -> Moments:
    """The moments of all values together, in the order of the rows."""
    return Moments(*(torch.stack(parts) for parts in zip(*rows))).merged()


class Collecting(TorchFunctionMode):
    """Answers calls of batch norms in training, without running statistics, and pools the moments of their inputs.

    The running mean that is given tells which batch norm calls.
    """

    def __init__(self, pools: Iterable[Pool], calls: int | None = None) -> None:
        super().__init__()
        self.pools = {id(pool.module._buffers["running_mean"]): pool for pool in pools}
        self.calls = calls  # after which a forward is of no more use; if one pool alone is collected
        self.order: dict[Pool, int] = {}  # the calls of each in this forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        composed = func is move_statistics  # by which a composition of stages says its moments, and no more
        given = dict(zip(_MOVED, args)) if composed else arguments(func, args, kwargs) or {}
        pool = self.pools.get(id(given.get("running_mean")))
        if pool is None or not (composed or given.get("training")):
            return func(*args, **kwargs)
        self.order[pool] = self.order.get(pool, 0) + 1
        if self.order[pool] == self.calls:
            pool.add(given["moments"] if composed else stats(given["input"], None, given.get("mask")))
            raise StopError
        output, moments = (None, given["moments"]) if composed else _normalized(given)
        pool.add(moments)
        return output


def _normalized(given: Mapping[str, Any]) -> tuple[Tensor, Moments]:
    """The output of a batch norm in training and the moments of its input. One operator reads the input, once."""
    input, residual = given["input"], given.get("residual")
    activation, param = given.get("activation"), given.get("activation_param")
    activations.check(activation, param)
    joins = residual is None or (residual.shape, residual.dtype) == (input.shape, input.dtype)
    name = (activation if joins else None) or "identity"
    number = activations.DEFAULTS[name] if param is None or not joins else param
    precise = torch.promote_types(input.dtype, torch.float32)
    mean, var = torch.zeros(2, input.size(1), dtype=precise, device=input.device)
    set_size, mask = given.get("set_size"), given.get("mask")
    if mask is not None:
        chain = residual, activation, param, set_size, mask
        norm = given.get("weight"), given.get("bias"), None, None, None, True, 0.0, given.get("eps", 1e-5)
        return torch.ops.bn_ext.batch_norm(input, *norm, *chain), stats(input, None, mask)
    output, exact_mean, _, _ = torch.ops.bn_ext.batch_norm_forward(
        input,
        given.get("weight"),
        given.get("bias"),
        mean,
        var,
        None,
        1.0,  # the momentum by which `var` becomes the unbiased variance of the batch
        given.get("eps", 1e-5),
        residual if joins else None,
        activations.NAMES.index(name),
        number or 0.0,
        set_size,
        False,
    )
    if not joins:
        output = finished(output, residual, activation, param)
    if set_size is not None:  # the call gives a mean of each set
        return output, stats(input)
    count = input.numel() // input.size(1)
    return output, Moments(exact_mean.new_tensor(count), exact_mean, var.double() * (count - 1))
