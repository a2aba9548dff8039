"""The model and the training that are looked at, and what is known of each batch norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from bn_ext._processes import in_group
from bn_ext.graph.conversion.classes import is_batch_norm
from bn_ext.graph.folding.copies import copied, evaluation, twin
from bn_ext.graph.folding.trace import trace
from bn_ext.graph.folding.watch import tensors
from bn_ext.nn import BatchNormLast
from bn_ext.nn.shared import SharedBatchNorm
from bn_ext.train.diagnosis.flow import Flow, Input

FUNCTION = "bn_ext.train.diagnose"
_WRAPPERS = (DataParallel, DistributedDataParallel)


class Norm:
    """One batch norm."""

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path, self.module = path, module
        self.by_batch = False  # whether it normalizes by its batch when the model trains
        self.inputs: list[Input] = []  # of the calls that were seen
        self.is_used = True  # unless a forward of the whole model neither called it nor read its tensors

    @property
    def tracks(self) -> bool:
        """Whether it updates running statistics when the model trains."""
        has_statistics = self.module._buffers.get("running_mean") is not None
        return self.by_batch and has_statistics and getattr(self.module, "track_running_stats", True) is True

    @property
    def is_synchronized(self) -> bool:
        return isinstance(self.module, nn.SyncBatchNorm) or self._is_named("SyncBatchNorm")

    @property
    def is_frozen(self) -> bool:
        """Whether its class never normalizes by its batch."""
        return self._is_named("Frozen")

    @property
    def is_untouched(self) -> bool:
        """Whether its statistics are those that it was made with."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        mean, var, counter = (self.module._buffers.get(name) for name in names)
        known = [tensor for tensor in (mean, var, counter) if tensor is not None]
        if mean is None or var is None or any(tensor.is_meta for tensor in known):
            return False
        return not bool(mean.any()) and bool((var == 1).all()) and (counter is None or not bool(counter.any()))

    @property
    def images(self) -> int | None:
        """In the smallest batch that was seen."""
        return min((input.shape[0] for input in self.inputs if input.shape is not None), default=None)

    @property
    def values(self) -> int | None:
        """Per channel, in the smallest batch that was seen; of all processes, if statistics are synchronized."""
        shapes = [input.shape for input in self.inputs if input.shape is not None and len(input.shape) > 1]
        counts = [shape.numel() // channels for shape in shapes if (channels := self._channels(shape))]
        if not counts:
            return None
        return min(counts) * (processes(getattr(self.module, "process_group", None)) if self.is_synchronized else 1)

    def _channels(self, shape: torch.Size) -> int:
        """Returns the number of channels of an input of this shape."""
        return shape[-1] if isinstance(self.module, BatchNormLast) else shape[1]

    def parameters(self) -> dict[int, str]:
        """The names of weight and bias by the ids of the parameters, or of what these are computed from."""
        found = {id(p): name for name, p in self.module._parameters.items() if name in ("weight", "bias")}
        parametrizations = self.module._modules.get("parametrizations")
        for path, p in parametrizations.named_parameters() if parametrizations is not None else ():
            found[id(p)] = path.partition(".")[0]
        return found

    def _is_named(self, word: str) -> bool:
        return any(word in cls.__name__ for cls in type(self.module).__mro__)


class Subject:
    """A model with its batch norms, optimizer and batches."""

    def __init__(self, model: nn.Module, optimizer: Any, example: Any, batches: Any, accumulation: int) -> None:
        self.model, self.optimizer, self.accumulation = model, optimizer, accumulation
        self.batches = len(batches) if hasattr(batches, "__len__") else batches
        self.batch_size = _batch_size(batches)
        self.norms = [Norm(path, module) for path, module in model.named_modules() if is_batch_norm(module)]
        self.biases: list[tuple[str, nn.Module]] = []  # layers whose bias a batch norm subtracts
        for path, module in model.named_modules() if self.norms else ():
            if any(is_lazy(tensor) for tensor in tensors(module)):
                raise ValueError(f"{FUNCTION}: {path or 'the model'} is not initialized, call the model first")
        if self.norms:
            self._look(example)

    @cached_property
    def by_module(self) -> Mapping[nn.Module, Norm]:
        return {norm.module: norm for norm in self.norms}

    def _look(self, example: Any) -> None:
        """Has a forward of a copy in training, or else traces of it, tell the order of calls."""
        core, prefix = _unwrapped(self.model)
        copy = twin(core, own=True, function=FUNCTION)
        if not core.training:
            copy.train()
        norms: dict[nn.Module, Norm] = {}
        for path, module in copy.named_modules():
            if (norm := self.by_module.get(core.get_submodule(path))) is not None:
                norms[module] = norm
                is_trained = module.training and not norm.is_frozen
                norm.by_batch = is_trained or norm.module._buffers.get("running_mean") is None
        for module in norms:
            module.training = False  # so that a batch of one value per channel is no error
        flow = Flow(copy)
        with evaluation():
            if example is None:
                trace(flow)
            else:
                args, kwargs = _arguments(example)
                flow.run(*copied(args), **copied(kwargs))
        for input in flow.inputs:
            if input.module in norms:
                norms[input.module].inputs.append(input)
        for module, norm in norms.items():
            reads = any(id(tensor) in flow.elsewhere for tensor in tensors(module))
            norm.is_used = example is None or bool(norm.inputs) or reads
        # A mean over several channels leaves the differences of their biases, one over other dimensions all of them.
        others = (SharedBatchNorm, BatchNormLast)
        own = {module for module, norm in norms.items() if norm.by_batch and not isinstance(module, others)}
        for layer, name in flow.useless_biases(own.__contains__):
            path = flow.paths[layer]
            found = core.get_submodule(path)
            if found._parameters.get(name) is not None:  # those that have none were given one of zeros
                self.biases.append((".".join(filter(None, (prefix, path))), found))


def processes(group: Any = None) -> int:
    """The number of processes in a group, or in all; 1 if there are no groups."""
    return dist.get_world_size(group) if in_group() else 1


def _unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model in wrappers, and its path."""
    path: list[str] = []
    while True:
        name = "module" if isinstance(model, _WRAPPERS) else "_orig_mod"
        if name not in model._modules or not isinstance(inner := model._modules[name], nn.Module):
            return model, ".".join(path)
        path.append(name)
        model = inner


def _arguments(example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _batch_size(batches: Any) -> int | None:
    """The batch size that a loader or its batch sampler has."""
    sizes = [getattr(place, "batch_size", None) for place in (batches, getattr(batches, "batch_sampler", None))]
    return next((size for size in sizes if isinstance(size, int)), None)
