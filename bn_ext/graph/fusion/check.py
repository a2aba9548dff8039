"""Whether a fused model gives what the plain one gives, found out without a trace on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from bn_ext._random import random_states
from bn_ext.graph.fusion.fused import install
from bn_ext.graph.fusion.installed import fusions, installed

# Rounding explains a difference of _UNITS units of the largest output, or of _TIMES times the change that comes from
# rounding the inputs and the outputs of batch norms once more.
_UNITS, _TIMES = 16, 32


def check(model: nn.Module, modes: Iterable[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Captures a fused model in each of the modes, and compares its outputs with those of the plain model.

    Raises:
        AssertionError: they differ by more than rounding explains.
    """
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        with _restored(model) as restore:  # what they become is not restored: evaluation leaves it as it begins
            _Outputs(model.eval(), restore, args, kwargs)
    for mode in modes:
        culprit = None
        with _restored(model) as restore:
            model.train(mode == "train")
            outputs = _Outputs(model, restore, args, kwargs)
            difference = outputs.difference()
            if difference is not None:
                culprit = _culprit(model, outputs)
        if (error := installed(model).captures.error) is not None:
            raise error
        if difference is not None:
            where = f"{type(model).__name__}, where {culprit} is fused," if culprit else type(model).__name__
            raise AssertionError(f"bn_ext.fuse: {where} gives other outputs in mode {mode!r}: {difference}")


class _Outputs:
    """The outputs of a model and of its fused call, from the same state."""

    def __init__(
        self, model: nn.Module, restore: Callable[[], None], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self.model, self.restore, self.args, self.kwargs = model, restore, args, kwargs
        self.plain = self.of(model._call_impl)
        self.inexact: list[Any] | None = None

    def of(self, call: Callable[..., Any], inexact: bool = False) -> list[Any]:
        self.restore()

        def twin(tensor: Tensor) -> Tensor:
            copy = tensor.detach().clone()
            copy = rounded(copy) if inexact else copy
            return copy.requires_grad_(tensor.requires_grad)

        with torch.set_grad_enabled(self.model.training), rounding(self.model) if inexact else nullcontext():
            args, kwargs = tree_map_only(Tensor, twin, (tuple(self.args), dict(self.kwargs)))
            return tree_leaves(call(*args, **kwargs))

    def difference(self) -> str | None:
        """Between the fused call and the plain one, in words; None if rounding explains it."""
        fused = self.of(self.model)
        difference = _difference(fused, self.plain, self.plain)
        if difference is not None:
            self.inexact = self.inexact or self.of(self.model._call_impl, inexact=True)
            difference = _difference(fused, self.plain, self.inexact)
        return difference


def _culprit(model: nn.Module, outputs: _Outputs) -> str | None:
    """The first batch norm whose fusion alone makes a difference."""
    for name in dict.fromkeys(fusion.batch_norm for fusion in fusions(model) if fusion.fused):
        install(model, only=name)
        if outputs.difference() is not None:
            return name
    return None


def _difference(mine: list[Any], theirs: list[Any], inexact: list[Any]) -> str | None:
    if len(mine) != len(theirs):
        return f"{len(mine)} instead of {len(theirs)}"
    for i, (one, other, third) in enumerate(zip(mine, theirs, inexact)):
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            if isinstance(one, Tensor) or isinstance(other, Tensor):
                return f"output {i} is a {type(one).__name__} instead of a {type(other).__name__}"
        elif (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
            return f"output {i} is {_kind(one)} instead of {_kind(other)}"
        elif one.is_floating_point():
            allowed = _UNITS * torch.finfo(one.dtype).eps * _distance(other, torch.zeros_like(other))
            allowed = max(allowed, _TIMES * _distance(third, other))
            if not (distance := _distance(one, other)) <= allowed:
                return f"output {i} is off by {distance:.1e}, where rounding explains {allowed:.1e}"
        elif not torch.equal(one, other):
            return f"output {i} has other values"
    return None


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of {tuple(tensor.shape)} on {tensor.device}"


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference. Equal values and pairs of NaN count as 0; NaN beside a number gives NaN."""
    one, other = one.detach().double(), other.detach().double()
    is_same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(is_same, 0.0, (one - other).abs()).max().item() if one.numel() else 0.0


def rounded(tensor: Tensor, seed: int = 0) -> Tensor:
    """Each value a unit of rounding up, down, or as it is. Another seed draws others."""
    if not tensor.is_floating_point():
        return tensor
    # A generator of its own, so that dropouts draw what they would without. On the CPU 32 bits of a seed count.
    generator = torch.Generator(tensor.device).manual_seed(tensor.numel() + 1_000_003 * seed)
    random = torch.randint(-1, 2, tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
    return tensor + tensor * random * torch.finfo(tensor.dtype).eps


@contextmanager
def rounding(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Rounds the outputs of batch norms once more, as :func:`rounded` does."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    handles = [norm.register_forward_hook(lambda _module, _args, output: rounded(output, seed)) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Gives a function that makes parameters, buffers and random states what they were; in the end flags are, too."""
    flags = [(module, module.training) for module in model.modules()]
    groups: list[dict[str, Any]] = [g for module in model.modules() for g in (module._parameters, module._buffers)]
    slots = [(group, dict(group)) for group in groups]
    tensors = [t for group in groups for t in group.values() if t is not None and not is_lazy(t)]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]
    restore_random_states = random_states()

    def restore() -> None:
        for group, before in slots:
            for name in group.keys() - before.keys():
                del group[name]
            group.update((name, tensor) for name, tensor in before.items() if tensor is None or not is_lazy(tensor))
        with torch.no_grad():
            for tensor, before in values:
                tensor.copy_(before)
        restore_random_states()

    # At the end tensors hold their values of before. They keep their versions too, so that a backward of an earlier
    # forward accepts them.
    versioned = tuple(tensor for tensor in tensors if not tensor.is_inference())
    with torch.autograd._unsafe_preserve_version_counter(versioned):
        try:
            yield restore
        finally:
            restore()
            for module, flag in flags:
                module.training = flag
