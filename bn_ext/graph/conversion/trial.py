"""Tries on a random input whether a module computes the same when its class is another."""

from __future__ import annotations

import copy
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bn_ext.graph.conversion.classes import Counterpart, UnlikeError, become


class Trials:
    """The trials so far: one for each class and configuration of modules."""

    def __init__(self) -> None:
        self.differences: dict[Hashable, str] = {}

    def check(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Raises UnlikeError if modules like ``module`` compute something else as members of ``cls``."""
        if not issubclass(cls, Counterpart):
            return
        configuration = _configuration(module)
        if configuration not in self.differences:
            self.differences[configuration] = _difference(module, cls)
        if difference := self.differences[configuration]:
            raise UnlikeError(difference)


def _configuration(module: nn.Module | None) -> Hashable:
    """The class, options and tensor types of ``module`` and its children: modules that share them compute alike."""
    if module is None:
        return None
    options = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, str, type(None)))}
    options["training"] = None
    tensors = {**module._parameters, **module._buffers}
    return (
        type(module),
        *options.items(),
        *((name, t if t is None else (t.shape, t.dtype, t.device)) for name, t in tensors.items()),
        *((name, _configuration(child)) for name, child in module._modules.items()),
    )


def _difference(module: nn.Module, cls: type[nn.Module]) -> str:
    """Says how a module of ``cls`` differs from ``module``. Empty if it does not, or if no trial is possible."""
    tensors = [*module.buffers(), *module.parameters()]
    if any(type(t) not in (Tensor, nn.Parameter) or t.device.type not in ("cpu", "cuda") for t in tensors):
        return ""
    floating = next((t for t in tensors if t.is_floating_point()), torch.empty(0, device="cpu"))
    channels = module.num_features if isinstance(module, _BatchNorm) else len(floating)
    extent = () if isinstance(module, nn.BatchNorm1d) else (2, 1, 2) if isinstance(module, nn.BatchNorm3d) else (2, 2)
    try:
        with torch.no_grad():
            twins = _twin(module), _twin(module)
            become(twins[1], cls)
            for training in (False, True):
                input = _random("input", floating.new_empty(5, channels, *extent))
                (expected, state), (output, states) = (_outcome(twin, training, input.clone()) for twin in twins)
                mode = "training" if training else "evaluation"
                if not _close(output, expected):
                    return f"other outputs in {mode} on a random input"
                if not all(map(_close, states, state)):
                    return f"other statistics in {mode} on a random input"
    except Exception as error:
        return f"{type(error).__name__} on a random input"
    return ""


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, without hooks, with random tensors: the same in every twin."""
    twin = object.__new__(type(module))
    own = {k: copy.copy(v) if isinstance(v, (list, dict, set)) else v for k, v in vars(module).items()}
    vars(twin).update({**own, **vars(nn.Module())})
    for name in ("forward", "_compiled_call_impl"):
        vars(twin).pop(name, None)
    vars(twin).update({name: _random(name, t) for name, t in vars(twin).items() if isinstance(t, Tensor)})
    for name, parameter in module._parameters.items():
        twin._parameters[name] = None if parameter is None else nn.Parameter(_random(name, parameter))
    for name, buffer in module._buffers.items():
        twin._buffers[name] = None if buffer is None else _random(name, buffer)
    for name, child in module._modules.items():
        twin._modules[name] = None if child is None else _twin(child)
    return twin


def _random(name: str, like: Tensor) -> Tensor:
    """Random numbers that depend on ``name`` alone; a copy, if it is not of a floating type."""
    if not like.is_floating_point():
        return like.clone()
    random, generator = torch.empty_like(like), torch.Generator(like.device).manual_seed(sum(name.encode()))
    return random.uniform_(0.01, 1, generator=generator) if "var" in name else random.normal_(generator=generator)


def _outcome(module: nn.Module, training: bool, input: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and buffers after a call. Every call draws the same random numbers."""
    module.train(training)
    with torch.random.fork_rng([input.device] if input.is_cuda else []):
        return module(input), list(module.buffers())


def _close(got: Tensor, expected: Tensor) -> bool:
    """Whether the two differ by no more than a few roundings."""
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        return False
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    tolerance = 32 * torch.finfo(expected.dtype).eps
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item(), equal_nan=True)
