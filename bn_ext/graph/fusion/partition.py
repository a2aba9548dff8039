"""AOTAutograd's partitioner makes outputs of batch norms again in the backward, where it would keep them.

A partitioner cuts the joint graph of forward and backward in two, and keeps what crosses the cut. The forward operator
takes statistics, so that a partitioner may not run it again. ``batch_norm_elemt`` with the statistics that it returned
makes the same output, bit by bit, of what the backward reads anyway.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

_FORWARD = torch.ops.bn_ext.batch_norm_forward
_ELEMT = torch.ops.bn_ext.batch_norm_elemt.default


def make_outputs_again(graph: Graph) -> None:
    """Has the backward part of a joint graph read outputs that are made again, where that keeps no more tensors."""
    backward: dict[Node, None] = {}
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and str(node.target).startswith("tangents")
        if is_tangent or any(input in backward for input in node.all_input_nodes):
            backward[node] = None
    first = next((node for node in backward if node.op == "call_function"), None)
    if first is None:
        return
    again: dict[Node, Node] = {}

    def readers(node: Node) -> list[Node]:
        return [user for user in node.users if user in backward and user.op != "output"]

    for node in list(graph.nodes):
        if node is first:
            break
        given = _arguments(node)
        results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        if given is None or not {0, 1, 2} <= results.keys() or not readers(results[0]):
            continue
        read = [one for one in (given["input"], given["residual"]) if one is not None]
        if not all(one in again or readers(one) for one in read):
            continue
        input, residual = (again.get(given[name], given[name]) for name in ("input", "residual"))
        rest = (given["activation"], given["activation_param"], given.get("set_size"), False, given.get("mask"))
        with graph.inserting_before(first):
            statistics = (results[1], results[2])
            made = graph.call_function(_ELEMT, (input, given["weight"], given["bias"], *statistics, residual, *rest))
            output = graph.call_function(operator.getitem, (made, 0))
        made.meta = {**node.meta, "val": (results[0].meta["val"], None)}
        made.meta.pop("eager_input_vals", None)  # Inductor would take the forward's arguments for those of this call
        output.meta = dict(results[0].meta)
        for one in (made, output):
            one.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        for reader in readers(results[0]):
            if reader not in (made, output):
                reader.replace_input_with(results[0], output)
        again[results[0]] = output


def _arguments(node: Node) -> dict[str, Any] | None:
    """The arguments of our forward operator by name, if ``node`` calls it."""
    if node.target is auto_functionalized_v2 and node.args[0] is _FORWARD.default:
        return dict(node.kwargs)
    if node.target is _FORWARD.evaluation:
        names = (argument.name for argument in _FORWARD.evaluation._schema.arguments)
        return {**dict(zip(names, node.args)), **node.kwargs}
    return None


def partition(joint: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, GraphModule]:
    """A ``partition_fn`` for AOTAutograd: torch's own, after :func:`make_outputs_again`."""
    make_outputs_again(joint.graph)
    joint.recompile()
    return min_cut_rematerialization_partition(joint, inputs, **options)


class Pass(CustomGraphPass):
    """:func:`make_outputs_again` as Inductor takes it."""

    def __call__(self, graph: Graph) -> None:
        make_outputs_again(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
