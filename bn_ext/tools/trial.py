"""One way to run a model: its step, what the step gives, and what the step takes."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from bn_ext._random import random_states
from bn_ext.tools.profiling import allocated, share_of_ours

Loss = Callable[[Any], Tensor]


def tensors_in(outputs: Any) -> list[Tensor]:
    """The tensors in containers, registered pytrees and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += tensors_in([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


def mean_square(outputs: Any) -> Tensor:
    """The mean of the squares of every floating-point output, added up."""
    means = [tensor.float().square().mean() for tensor in tensors_in(outputs) if tensor.is_floating_point()]
    if not means:
        kind = type(outputs).__name__
        raise TypeError(f"bn_ext.compare: no tensor of a floating type in the {kind} that it returns: give loss=")
    return sum(means[1:], means[0])


class Call(NamedTuple):
    """How a model is called."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    loss: Loss
    autocast: torch.dtype | None
    device: torch.device

    def inputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with other inputs, which share nothing with these."""

        def changed(tensor: Tensor) -> Tensor:
            return change(tensor.detach()).clone().requires_grad_(tensor.requires_grad)

        args, kwargs = tree_map_only(Tensor, changed, (tuple(self.args), dict(self.kwargs)))
        return self._replace(args=args, kwargs=kwargs)

    def double(self) -> Call:
        """The same in float64, without autocast."""
        return self.mapped(lambda t: t.double() if t.is_floating_point() else t)._replace(autocast=None)


class Trial:
    """A model with a way to call it. In training mode a step is forward, loss and backward, else it is the forward."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        self.model, self.training = model, model.training
        self.given, self.call = call, call.mapped(lambda tensor: tensor)
        self.versions = [tensor._version for tensor in self.call.inputs()]

    def restore_inputs(self) -> None:
        """Undoes what the model has written to its inputs."""
        for i, (given, own) in enumerate(zip(self.given.inputs(), self.call.inputs(), strict=True)):
            if own._version != self.versions[i]:
                with torch.no_grad():
                    own.copy_(given)
                self.versions[i] = own._version

    def forward(self) -> Any:
        call = self.call
        with torch.autocast(call.device.type, call.autocast, enabled=call.autocast is not None):
            return self.model(*call.args, **call.kwargs)

    def forget_gradients(self) -> None:
        for tensor in (*self.model.parameters(), *self.call.inputs()):
            tensor.grad = None

    def loss(self) -> Tensor:
        return self._loss_of(self.forward())

    def _loss_of(self, outputs: Any) -> Tensor:
        loss = self.call.loss(outputs)
        if not isinstance(loss, Tensor):
            raise TypeError(f"bn_ext.compare: loss should return a tensor, got an object of {type(loss).__name__}")
        if not loss.requires_grad:
            raise ValueError("bn_ext.compare: nothing in the model needs a gradient: compare with training=False")
        return loss

    def step(self) -> Any:
        """The outputs of a step that is done."""
        self.restore_inputs()
        with torch.set_grad_enabled(self.training):
            if not self.training:
                return self.forward()
            self.forget_gradients()
            outputs = self.forward()
            self._loss_of(outputs).backward()
            return outputs

    def results(self) -> dict[str, Tensor]:
        """Outputs, gradients and buffers of a step by name. Every trial has the same random numbers."""
        with seeded():
            outputs = tensors_in(self.step())
        if not outputs:
            raise TypeError("bn_ext.compare: there is no tensor in what the model returns")
        leaves = {**dict(self.model.named_parameters()), **{f"input {i}": t for i, t in enumerate(self.call.inputs())}}
        found = {f"output {i}": tensor for i, tensor in enumerate(outputs)}
        found |= {f"gradient of {name}": leaf.grad for name, leaf in sorted(leaves.items()) if leaf.grad is not None}
        found |= {f"buffer {name}": buffer for name, buffer in sorted(self.model.named_buffers())}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def memory(self) -> tuple[int | None, int]:
        """Bytes that the forward keeps for the backward, if there is one, and the peak of the step."""
        device = str(self.call.device)
        self.restore_inputs()
        self.forget_gradients()  # else they would be freed meanwhile
        kept = allocated(self.loss, device)[0] if self.training else None
        return kept, allocated(self.step, device)[1]

    def share_of_ours(self) -> float:
        """The part of a step's time that our operators take, 0 to 1."""
        return share_of_ours(self.step, str(self.call.device))


@contextmanager
def seeded() -> Iterator[None]:
    """Runs a block with the same random numbers each time, and restores the random states after it."""
    restore, numpy = random_states(), sys.modules.get("numpy")
    torch.manual_seed(0)
    random.seed(0)
    if numpy is not None:
        numpy.random.seed(0)
    try:
        yield
    finally:
        restore()
