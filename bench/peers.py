"""Who is measured: bn_ext and the batch normalizations that torch itself can run."""

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
from bench.problems import EPS, MOMENTUM, Problem

OURS = "bn_ext"
BASELINE = "ATen"

Pass = Callable[[], "Tensor | tuple[Tensor, ...]"]


@dataclass
class Peer:
    """One implementation of batch normalization, bound to one problem."""

    train: Callable[[Tensor], Tensor]
    evaluate: Callable[[Tensor], Tensor]
    input: Tensor
    dy: Tensor
    affine: tuple[Tensor, Tensor]
    running: tuple[Tensor, Tensor]  # what ``train`` updates

    def on(self, input: Tensor, dy: Tensor) -> Peer:
        """The same implementation on other tensors."""
        return replace(self, input=input.detach().requires_grad_(), dy=dy)

    def call(self, name: str) -> Pass:
        """The pass ``name`` as a call without arguments, with nothing in it but the pass."""
        if name == "inference":
            return partial(self.evaluate, self.input.detach())
        forward = partial(self.train, self.input)
        if name == "forward":
            return forward
        wanted = (self.input, *self.affine)
        if name == "both":
            return lambda: torch.autograd.grad(forward(), wanted, self.dy)
        output = forward()
        return lambda: torch.autograd.grad(output, wanted, self.dy, retain_graph=True)


def modules(package: ModuleType, problem: Problem) -> Peer:
    """``package.BatchNorm1d`` or ``BatchNorm2d``, as a network calls it."""
    kind = getattr(package, "BatchNorm1d" if problem.input.dim() == 2 else "BatchNorm2d")

    def module() -> Any:  # torch's own type calls every attribute a tensor or a module
        made = kind(problem.input.size(1), eps=EPS, momentum=MOMENTUM, device=problem.input.device)
        names = ("weight", "bias", "running_mean", "running_var")
        made.load_state_dict({name: getattr(problem, name) for name in names}, strict=False)
        return made

    training, frozen = module(), module().eval()
    return Peer(
        train=training,
        evaluate=frozen,
        input=problem.input.detach().requires_grad_(),
        dy=problem.dy,
        affine=(training.weight, training.bias),
        running=(training.running_mean, training.running_var),
    )


Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def functions(train: Function, evaluate: Function, input: Tensor, dy: Tensor, problem: Problem) -> Peer:
    """Two functions of input, running_mean, running_var, weight and bias."""
    weight, bias = (p.clone().requires_grad_() for p in (problem.weight, problem.bias))
    mean, var = problem.running_mean.clone(), problem.running_var.clone()
    return Peer(
        train=lambda x: train(x, mean, var, weight, bias),
        evaluate=lambda x: evaluate(x, problem.running_mean, problem.running_var, weight, bias),
        input=input.detach().requires_grad_(),
        dy=dy,
        affine=(weight, bias),
        running=(mean, var),
    )


def _train(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(input, mean, var, weight, bias, True, MOMENTUM, EPS)


def _evaluate(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(input, mean, var, weight, bias, False, MOMENTUM, EPS)


def _without_cudnn(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def plain(x: Tensor) -> Tensor:
        before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
        try:
            return call(x)
        finally:
            torch.backends.cudnn.enabled = before

    return plain


def aten(problem: Problem) -> Peer:
    """torch's modules on its own kernels."""
    peer = modules(torch.nn, problem)
    if not problem.input.is_cuda:
        return peer
    return replace(peer, train=_without_cudnn(peer.train), evaluate=_without_cudnn(peer.evaluate))


def cudnn(problem: Problem) -> Peer:
    """torch's modules where it gives their work to cuDNN."""
    peer = modules(torch.nn, problem)
    node = type(peer.train(peer.input).grad_fn).__name__
    if "Cudnn" not in node:
        raise NotImplementedError(f"torch does not give this to cuDNN but to {node}")
    return peer


def onednn(problem: Problem) -> Peer:
    """oneDNN through tensors already in its own format."""
    if problem.layout != "contiguous":
        raise NotImplementedError("an mkldnn tensor has no channels-last form")
    return functions(_train, _evaluate, problem.input.to_mkldnn(), problem.dy.to_mkldnn(), problem)


def inductor(problem: Problem) -> Peer:
    """``torch.compile`` of the function alone, for this shape and, on the CPU, this number of threads."""
    import torch._dynamo
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.reset()
    cached = problem.input.is_cuda  # on the CPU the code depends on the number of threads
    settings = (
        (torch._inductor.config, "compile_threads", 1),  # no helper processes beside the measurement
        (torch._inductor.config, "fx_graph_cache", cached),
        (torch._functorch.config, "enable_autograd_cache", cached),
        (torch._functorch.config, "donated_buffer", False),  # backward alone runs more than once on one graph
    )
    for config, name, value in settings:
        setattr(config, name, value)
    train, evaluate = (torch.compile(f, fullgraph=True, dynamic=False) for f in (_train, _evaluate))
    return functions(train, evaluate, problem.input, problem.dy, problem)


PEERS: dict[str, Callable[[Problem], Peer]] = {
    OURS: partial(modules, bn_ext),
    BASELINE: aten,
    "oneDNN": onednn,
    "cuDNN": cudnn,
    "Inductor": inductor,
}
OTHERS = {"cpu": ("oneDNN", "Inductor"), "cuda": ("cuDNN", "Inductor")}
