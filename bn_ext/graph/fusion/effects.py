"""The effects of nodes in a graph that Dynamo captured: their memory, what they write to, what else they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils._pytree import tree_leaves, tree_map_only

# They update running statistics, which the versions of tensors do not show.
_UPDATING = ("batch_norm", "instance_norm")


def value(node: Node) -> Any:
    """The fake result that Dynamo computed."""
    return node.meta.get("example_value")


def name_of(node: Node) -> str:
    """The name of what is called."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def tensors(nodes: Iterable[Node]) -> list[Tensor]:
    return [leaf for node in nodes for leaf in tree_leaves(value(node)) if isinstance(leaf, Tensor)]


def memory(nodes: Iterable[Node]) -> set[int]:
    """The memory that holds the results of ``nodes``. A view is in the memory of its base."""
    return {_storage(tensor) for tensor in tensors(nodes)}


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:  # sparse
        return id(tensor)


def alike(one: Any, other: Any) -> bool:
    """Whether two results are plain tensors of one shape, layout in memory, type and device, whatever the sizes are."""
    return (
        type(one) is type(other) is FakeTensor
        and one.layout == other.layout == torch.strided
        and (one.dtype, one.device) == (other.dtype, other.device)
        and statically_known_true(sym_eq(one.shape, other.shape))
        and statically_known_true(sym_eq(one.stride(), other.stride()))
    )


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def only_computes(node: Node) -> bool:
    """Whether a node computes something and changes no setting, such as gradient mode or autocast."""
    if node.op in ("placeholder", "get_attr", "output") or name_of(node) == "_log_api_usage_once":
        return True
    return value(node) is not None and not isinstance(node.target, HigherOrderOperator)


def writes(node: Node, targets: Iterable[Node]) -> bool:
    """Whether a call may write to the memory of ``targets``, in whatever way it is spelled."""
    shared = memory(targets)
    suspects = [input for input in node.all_input_nodes if shared & memory([input])]
    if not suspects or node.op not in ("call_function", "call_method"):
        return False
    if not only_computes(node):
        return True
    operator = node.target
    if isinstance(operator, OpOverloadPacket) and len(operator.overloads()) == 1:
        operator = getattr(operator, operator.overloads()[0])
    if isinstance(operator, OpOverload):
        return bool(shared & memory(_written(operator, node)))
    if name_of(node).endswith(_UPDATING):
        return any(input is not node.args[0] for input in suspects) if node.args else True
    return _changes(node, tensors(suspects))


def _written(operator: OpOverload, node: Node) -> list[Node]:
    """Finds what an operator writes to, by its schema."""
    arguments = operator._schema.arguments
    given = {**dict(zip((argument.name for argument in arguments), node.args)), **node.kwargs}
    written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Node)]


def _changes(node: Node, suspects: list[Tensor]) -> bool:
    """Whether a call of fake tensors in the same memory gives them new versions."""
    function = node.target if callable(node.target) else getattr(Tensor, str(node.target), None)
    if function is None or not all(type(t) is FakeTensor and not t.is_inference() for t in suspects):
        return True

    def twin(argument: Node) -> Any:
        return tree_map_only(Tensor, Tensor.detach, value(argument))

    mode = suspects[0].fake_mode  # type: ignore[attr-defined]
    shapes = mode.shape_env
    before = [tensor._version for tensor in suspects]
    try:
        with mode, nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols():
            function(*torch.fx.map_arg(node.args, twin), **torch.fx.map_arg(node.kwargs, twin))
    except Exception:
        return True
    return before != [tensor._version for tensor in suspects]
