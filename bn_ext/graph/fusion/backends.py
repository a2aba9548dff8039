"""Two backends run a rewritten graph: torch as it is, or Inductor. ``torch.compile`` finds both by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.fx import GraphModule

from bn_ext.graph.fusion.rewrite import checkpointed, rewrite


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

    rewrite(module)
    return compile(module, [*inputs], {**list_mode_options(mode or "default"), **(options or {})})


# Marks for whoever wonders whether a backend fuses.
eager.fuses = inductor.fuses = True  # type: ignore[attr-defined]


def run(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A rewritten graph as a function."""
    # A checkpointed region would update the running statistics again in the backward; in a graph of both it does not.
    return aot_eager(module, inputs) if checkpointed(module) else module.forward
