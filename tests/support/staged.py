"""A call in statistic sets by the fused operator, and the same call by the stages."""

from __future__ import annotations

from typing import Any

import torch
from cases import Arguments

from bn_ext.stages import Chain, backward_elemt, backward_reduce, elemt, merge_stats, stats


def fused(a: Arguments, set_size: int | None, training: bool = True, momentum: float | None = 0.1) -> dict[str, Any]:
    """All results of one call and its gradients. Three batches came before it."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (a.input, a.weight, a.bias, a.residual)]
    running, batches = [a.running_mean.clone(), a.running_var.clone()], torch.tensor(3, device=a.input.device)
    input, weight, bias, residual = leaves
    norm = input, weight, bias, *running, batches, training, momentum, a.eps
    output = torch.ops.bn_ext.batch_norm(*norm, residual, a.activation, a.activation_param, set_size)
    wanted = {n: t for n, t in zip(("dx", "dweight", "dbias", "dresidual"), leaves, strict=True) if t is not None}
    gradients = dict(zip(wanted, torch.autograd.grad(output, wanted.values(), a.dy), strict=True))
    shared = {"running_mean": running[0], "running_var": running[1], "batches": batches}
    return {"output": output.detach()} | gradients | shared


def composed(a: Arguments, set_size: int | None, keeps_branches: bool = False) -> dict[str, Any]:
    """All results of the stages. The backward reads the branches or the residual. Sets stay apart, and leave the
    running statistics alone."""
    running, batches = (a.running_mean.clone(), a.running_var.clone()), torch.tensor(3, device=a.input.device)
    moments = stats(a.input, set_size)
    statistics = moments.each(a.eps) if set_size else merge_stats(moments, *running, batches, 0.1, a.eps)
    chain = Chain(a.residual, a.activation, a.activation_param, keeps_branches)
    parameters = a.weight, a.bias
    output, branches = elemt(a.input, statistics, *parameters, chain, set_size)
    assert (branches is not None) == keeps_branches
    if keeps_branches:
        chain = chain._replace(residual=None, branches=branches)
    sums = backward_reduce(a.dy, a.input, statistics, *parameters, chain, set_size)
    dx, dresidual = backward_elemt(a.dy, a.input, statistics, sums, *parameters, chain, set_size)
    dweight, dbias = (g.to(a.weight.dtype) for g in sums.gradients(statistics))
    results = {"output": output, "dx": dx, "dweight": dweight, "dbias": dbias}
    if a.residual is not None:
        results["dresidual"] = dresidual
    shared = {"running_mean": running[0], "running_var": running[1], "batches": batches}
    return results | (shared if set_size is None else {})
