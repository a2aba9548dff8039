"""The implementations that are measured: bn_ext, and those of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bn_ext
from bench.workloads import EPS, MOMENTUM, Workload

OURS = "bn_ext"
BASELINE = "ATen"

Pass = Callable[[], "Tensor | tuple[Tensor, ...]"]
Call = Callable[..., Tensor]


def _add_relu(output: Tensor, residual: Tensor) -> Tensor:
    output += residual
    return F.relu_(output)


# A residual network writes the operations behind the batch norm of a pattern like this.
FOLLOWING: dict[str, Call] = {"bn": lambda output: output, "bn+relu": F.relu_, "bn+add+relu": _add_relu}


@dataclass
class Peer:
    """One implementation of a pattern, bound to one workload."""

    train: Call
    evaluate: Call  # by constants
    inputs: tuple[Tensor, ...]
    dy: Tensor
    affine: tuple[Tensor, Tensor]
    running: tuple[Tensor, Tensor]  # what ``train`` updates

    def on(self, inputs: tuple[Tensor, ...], dy: Tensor) -> Peer:
        """The same implementation on other tensors."""
        return replace(self, inputs=_leaves(*inputs), dy=dy)

    def call(self, name: str) -> Pass:
        """The pass ``name`` as a call without arguments, with nothing in it but the pass."""
        if name == "inference":
            return partial(self.evaluate, *(t.detach() for t in self.inputs))
        forward = partial(self.train, *self.inputs)
        if name == "forward":
            return forward
        wanted = (*self.inputs, *self.affine)
        if name == "both":
            return lambda: torch.autograd.grad(forward(), wanted, self.dy)
        if name == "frozen":
            forward, wanted = partial(self.evaluate, *self.inputs), self.inputs
        output = forward()
        return lambda: torch.autograd.grad(output, wanted, self.dy, retain_graph=True)


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def modules(package: ModuleType, workload: Workload, name: str = "BatchNorm") -> Peer:
    """The module of ``package`` with this name, for the workload's number of dimensions, as a network calls it."""
    kind = getattr(package, f"{name}1d" if workload.input.dim() == 2 else f"{name}2d")

    def module() -> Any:  # torch's own type calls every attribute a tensor or a module
        made = kind(workload.input.size(1), eps=EPS, momentum=MOMENTUM, device=workload.input.device)
        names = ("weight", "bias", "running_mean", "running_var")
        made.load_state_dict({name: getattr(workload, name) for name in names}, strict=False)
        return made

    training, frozen = module(), module().eval().requires_grad_(False)
    return Peer(
        train=training,
        evaluate=frozen,
        inputs=_leaves(*workload.inputs),
        dy=workload.dy,
        affine=(training.weight, training.bias),
        running=(training.running_mean, training.running_var),
    )


def ours(workload: Workload) -> Peer:
    """One call a pattern."""
    return modules(bn_ext, workload, "BatchNormAct" if workload.relu else "BatchNorm")


def torchs(workload: Workload) -> Peer:
    """torch's module, and one call each for the addition and the activation after it."""
    peer = modules(torch.nn, workload)
    if workload.pattern == "bn":
        return peer
    follow = FOLLOWING[workload.pattern]

    def followed(call: Call) -> Call:
        return lambda input, *residual: follow(call(input), *residual)

    return replace(peer, train=followed(peer.train), evaluate=followed(peer.evaluate))


def functions(train: Call, evaluate: Call, inputs: tuple[Tensor, ...], dy: Tensor, workload: Workload) -> Peer:
    """Two functions of running_mean, running_var, weight, bias and the inputs."""
    weight, bias = (p.clone().requires_grad_() for p in (workload.weight, workload.bias))
    mean, var = workload.running_mean.clone(), workload.running_var.clone()
    return Peer(
        train=partial(train, mean, var, weight, bias),
        evaluate=partial(evaluate, workload.running_mean, workload.running_var, weight.detach(), bias.detach()),
        inputs=_leaves(*inputs),
        dy=dy,
        affine=(weight, bias),
        running=(mean, var),
    )


def _function(workload: Workload, training: bool) -> Call:
    follow = FOLLOWING[workload.pattern]

    def pattern(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, input: Tensor, *residual: Tensor) -> Tensor:
        return follow(F.batch_norm(input, mean, var, weight, bias, training, MOMENTUM, EPS), *residual)

    return pattern


def without_cudnn(call: Call) -> Call:
    def plain(*inputs: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return call(*inputs)

    return plain


def aten(workload: Workload) -> Peer:
    """torch's modules on its own kernels."""
    peer = torchs(workload)
    if not workload.input.is_cuda:
        return peer
    return replace(peer, train=without_cudnn(peer.train), evaluate=without_cudnn(peer.evaluate))


def cudnn(workload: Workload) -> Peer:
    """torch's modules where it gives their work to cuDNN."""
    node = type(modules(torch.nn, workload).train(workload.input.detach().requires_grad_()).grad_fn).__name__
    if "Cudnn" not in node:
        raise NotImplementedError(f"torch does not give this to cuDNN but to {node}")
    return torchs(workload)


def onednn(workload: Workload) -> Peer:
    """oneDNN through tensors already in its own format."""
    if workload.layout != "contiguous":
        raise NotImplementedError("an mkldnn tensor has no channels-last form")
    train, evaluate = (_function(workload, training) for training in (True, False))
    inputs = tuple(t.to_mkldnn() for t in workload.inputs)
    return functions(train, evaluate, inputs, workload.dy.to_mkldnn(), workload)


def set_inductor(cached: bool, backward_repeats: bool, workers: int = 1) -> None:
    """Forgets what was compiled; ``backward_repeats`` if it runs more than once on one graph."""
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    settings = (
        (torch._dynamo.config, "recompile_limit", 64),  # the patterns of several networks are of one class
        (torch._inductor.config, "compile_threads", workers),
        (torch._inductor.config, "fx_graph_cache", cached),
        (torch._functorch.config, "enable_autograd_cache", cached),
        (torch._functorch.config, "donated_buffer", not backward_repeats),
    )
    for config, name, value in settings:
        setattr(config, name, value)


def inductor(workload: Workload) -> Peer:
    """``torch.compile`` of the function alone, for this shape and, on the CPU, this number of threads."""
    # On the CPU the code depends on the number of threads. Compile workers would go on beside the measurement.
    set_inductor(cached=workload.input.is_cuda, backward_repeats=True)
    train, evaluate = (
        torch.compile(_function(workload, training), fullgraph=True, dynamic=False) for training in (True, False)
    )
    return functions(train, evaluate, workload.inputs, workload.dy, workload)


PEERS: dict[str, Callable[[Workload], Peer]] = {
    OURS: ours,
    BASELINE: aten,
    "oneDNN": onednn,
    "cuDNN": cudnn,
    "Inductor": inductor,
}
OTHERS = {"cpu": ("oneDNN", "Inductor"), "cuda": ("cuDNN", "Inductor")}
