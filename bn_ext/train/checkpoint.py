"""Activation checkpointing under which every batch counts once."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from bn_ext.functional import operator
from bn_ext.nn.composed import Rule, moments_of, move_statistics

_ARGUMENTS = [argument.name for argument in operator.default._schema.arguments]
_CALLED = (operator, operator.default)
_FORWARD = torch.ops.bn_ext.batch_norm_forward.default
_OF_FORWARD = [argument.name for argument in _FORWARD._schema.arguments]
_ELEMT = torch.ops.bn_ext.batch_norm_elemt.default

# A cumulative average would need its counter, so that the momentum is a number.
_LEFT_ALONE = {"running_mean": None, "running_var": None, "num_batches_tracked": None, "momentum": 0.0}

Statistics = tuple[Tensor, Tensor]  # mean and invstd


class _Noting(TorchDispatchMode):
    """Notes the statistics that normalize an input."""

    def __init__(self, noted: list[Statistics]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func is _FORWARD:
            self.noted.append((results[1], results[2]))
        return results


class _Reusing(TorchDispatchMode):
    """Normalizes by given statistics, without a reduction, and writes to nothing."""

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.statistics = statistics

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _FORWARD:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_OF_FORWARD, args))
        of_channels = given["weight"], given["bias"], *self.statistics
        chain = (given[name] for name in ("residual", "activation", "activation_param", "set_size", "with_branches"))
        output, branches = _ELEMT(given["input"], *of_channels, *chain, given.get("mask"))
        return output, *self.statistics, branches


class _First(TorchFunctionMode):
    """The first forward: notes the statistics of each call of the operator, and the moments of each composed call."""

    def __init__(self) -> None:
        super().__init__()
        # By running mean or module, and sizes, so that a call which the second forward does not make takes no other's
        # place. Both are kept, so that nothing else gets their ids.
        self.noted: dict[Any, list[Any]] = defaultdict(list)
        self.means: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is moments_of and not is_compiling():
            moments = func(*args)
            self.means.append(args[2])
            self.noted[_key_of_composed(*args)].append(moments)
            return moments
        if func not in _CALLED or is_compiling():
            return func(*args, **kwargs)
        given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
        self.means.append(given["running_mean"])
        with _Noting(self.noted[_key(given)]):
            return func(*args, **kwargs)


class _Second(TorchFunctionMode):
    """The second forward: calls the operator with the statistics of the first, and in training without running
    statistics and counter, to which it would write. Composed calls have the moments of the first."""

    def __init__(self, first: _First) -> None:
        super().__init__()
        self.first = first

    def __enter__(self) -> _Second:
        self.left = {key: iter(noted) for key, noted in self.first.noted.items()}
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is move_statistics:
            return None
        if func is moments_of and not is_compiling():
            noted = next(self.left.get(_key_of_composed(*args), iter(())), None)
            return func(*args) if noted is None else noted
        if func not in _CALLED:
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(_ARGUMENTS, args)), **(kwargs or {})}
        statistics = None if is_compiling() else next(self.left.get(_key(given), iter(())), None)
        if given["training"]:
            given |= _LEFT_ALONE
        if statistics is None:
            return func(**given)
        with _Reusing(statistics):
            return func(**given)


def _key(given: dict[str, Any]) -> tuple[int, torch.Size, bool]:
    return id(given["running_mean"]), given["input"].shape, given["training"]


def _key_of_composed(input: Tensor, rule: Rule, owner: object) -> tuple[int, torch.Size, type]:
    return id(owner), input.shape, type(rule)


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A ``context_fn`` for :func:`torch.utils.checkpoint.checkpoint`: the second forward, in the backward, leaves the
    running statistics and batch counters of our modules alone.

    It normalizes by the statistics that the first forward found, and so reads each input once, without a reduction, and
    gives the same bits; a SyncBatchNorm makes no collective then. Compiled parts inside reduce again.

    Checkpoint calls it: give the function itself, without parentheses. Batch norms that are still torch's count twice.

    Returns:
        The contexts of the first and of the second forward.

    Raises:
        ValueError: by checkpoint, with ``use_reentrant=True``, which takes no contexts.

    Example:
        >>> block, x = bn_ext.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
        >>> contexts = bn_ext.checkpoint_contexts
        >>> y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        >>> y.sum().backward()
        >>> block.num_batches_tracked
        tensor(1)
    """
    if is_compiling():  # a compiled step writes once anyway, and takes no contexts but these
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    first = _First()
    return first, _Second(first)
