"""Copies of models and inputs, to be run in the place of the originals."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bn_ext._random import random_states


def twin(model: nn.Module, own: bool = False, function: str = "fold") -> nn.Module:
    """A copy of all modules. It shares their tensors, or has copies of its own so that it can be called.

    Raises:
        TypeError: an attribute cannot be copied. The message begins with the name of our ``function``.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not (own and value.is_leaf):
                memo[id(value)] = value.detach().clone() if own else value
            elif dist.is_available() and isinstance(value, dist.ProcessGroup):
                memo[id(value)] = value
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception as error:
        raise TypeError(f"{function}: {_uncopied(model, memo)} cannot be copied: {error}") from error


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> str:
    """The attribute that keeps a model from being copied."""
    memo |= {id(module): module for module in model.modules()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"{name} of {path or 'the model'}"
    return "the model"


@contextmanager
def evaluation() -> Iterator[None]:
    """Runs a block without gradients and compiled code, and restores the state of random numbers after it."""
    restore = random_states()
    # Without dynamo there is no compiled code, and its import takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        restore()


def copied(inputs: Any) -> Any:
    """Copies the tensors in nested containers."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
