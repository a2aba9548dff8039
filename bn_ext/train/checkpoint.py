"""Activation checkpointing under which every batch counts once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from bn_ext.functional import operator

_ARGUMENTS = {a.name: a.alias_info is not None and a.alias_info.is_write for a in operator.default._schema.arguments}


class _OnCopies(TorchFunctionMode):
    """Calls the operator with copies of the tensors that it would write to: running statistics and counter."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (operator, operator.default):
            return func(*args, **(kwargs or {}))
        given = {**dict(zip(_ARGUMENTS, args)), **(kwargs or {})}
        # Copies, not None: a cumulative average needs its counter.
        return func(**{name: a.clone() if _ARGUMENTS[name] and a is not None else a for name, a in given.items()})


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A ``context_fn`` for :func:`torch.utils.checkpoint.checkpoint`: the second forward, in the backward, leaves the
    running statistics and batch counters of our modules alone.

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
    return nullcontext(), _OnCopies()
