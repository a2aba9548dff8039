"""Two backends run a rewritten graph: torch as it is, or Inductor. ``torch.compile`` finds both by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from bn_ext.graph.fusion.rewrite import checkpointed, rewrite
from bn_ext.train.recording import recorded

# Functions whose results recompute_outputs makes again if they read outputs of batch norms.
_POOLS = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_CHEAP = (operator.add, operator.mul, torch.add, torch.mul, torch.cat, *_POOLS, F.interpolate)
_RECORDED: dict[Any, Any] = {function: recorded(function) for function in _CHEAP}


def eager(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """``torch.compile(model, backend="bn_ext")``: fuses, and calls one operator after the other."""
    rewrite(module)
    return run(module, inputs)


def inductor(
    module: GraphModule,
    inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="bn_ext_inductor")``: fuses, and hands what there is then to Inductor."""
    from torch._inductor import compile, list_mode_options

    from bn_ext.graph.fusion.partition import Pass

    rewrite(module)
    given = {**list_mode_options(mode or "default"), **(options or {})}
    return compile(module, [*inputs], {"joint_custom_post_pass": Pass(), **given})


# Marks for whoever wonders whether a backend fuses.
eager.fuses = inductor.fuses = True  # type: ignore[attr-defined]


def run(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A rewritten graph as a function."""
    # A checkpointed region would update the running statistics again in the backward; in a graph of both it does not.
    if checkpointed(module):
        return aot_eager(module, inputs)
    for node in module.graph.nodes:
        if node.op == "call_function":
            node.target = _RECORDED.get(node.target, node.target)
    module.recompile()
    return module.forward
