"""The rewriting of a torch-level graph: batch norm, the addition after it and the activation after that, one call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from bn_ext import _C
from bn_ext import activation as activations
from bn_ext.functional import has_kernels, operator
from bn_ext.graph.fusion.effects import alike, between, memory, name_of, only_computes, value, writes
from bn_ext.graph.fusion.spelling import activation_of, call_of, passes_through, reader
from bn_ext.nn.base import Ours

_ARGUMENTS = tuple(argument.name for argument in operator.default._schema.arguments)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_TORCHS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: tuple(inspect.signature(F.batch_norm).parameters),
    torch.batch_norm: ("input", "weight", "bias", *_STATISTICS[:2], "training", "momentum", "eps", "cudnn_enabled"),
}
_DEFAULTS = {"training": False, "momentum": 0.1, "eps": 1e-5}
_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


class Fusion(NamedTuple):
    """A record says what became of one call of a batch norm."""

    batch_norm: str  # the path of its module; of a functional call, that of the module around it and its node's name
    fused: tuple[str, ...]  # what it computes besides, in order: "add", an activation
    reason: str  # why no more; empty after an activation
    on_kernels: bool | None = None  # whether our kernels compute it; None if it is in no graph

    def __str__(self) -> str:
        fused = " + ".join(self.fused) or "nothing fused"
        return f"{self.batch_norm}: {fused}" + (f" ({self.reason})" if self.reason else "")


class _ObstacleError(Exception):
    """Why a batch norm is not fused with more."""


def rewrite(module: GraphModule, names: Mapping[str, str] | None = None, only: str | None = None) -> list[Fusion]:
    """Fuses what can be fused in a graph, in place, and in the checkpointed regions that it calls.

    Args:
        module: a graph as Dynamo captures it: of torch's functions, with fake results in ``meta["example_value"]``.
        names: paths of modules by their id, as a string. Others are named as in Dynamo's sources.
        only: the name of the one batch norm to fuse, if not all.

    Returns:
        One :class:`Fusion` for each call of a batch norm.
    """
    fusions = _Rewriting(module, names or {}, only).run()
    for region in checkpointed(module):
        fusions += rewrite(region, names, only)
    return fusions


def checkpointed(module: GraphModule) -> list[GraphModule]:
    """The graphs of the checkpointed regions."""
    calls = [node for node in module.graph.nodes if name_of(node) in _CHECKPOINTS]
    inputs = [input for node in calls for input in node.all_input_nodes if input.op == "get_attr"]
    regions = [getattr(module, str(input.target)) for input in inputs]
    return list(dict.fromkeys(region for region in regions if isinstance(region, GraphModule)))


class _Rewriting:
    def __init__(self, module: GraphModule, names: Mapping[str, str], only: str | None) -> None:
        self.module = module
        self.graph = module.graph
        self.names = names
        self.only = only
        self.views: dict[int, list[Node]] = {}  # for each piece of memory, all results that lie in it
        for node in self.graph.nodes:
            self.note(node)
        # The inputs that a caller may write to after the call.
        self.inputs = [
            node
            for node in self.graph.find_nodes(op="placeholder")
            if isinstance(given := value(node), torch.Tensor) and not isinstance(given, torch.nn.Parameter)
        ]
        # The inputs that may be views of other inputs: all but buffers of modules, by Dynamo's names.
        self.arguments = [node for node in self.inputs if "_buffers_" not in node.name]

    def run(self) -> list[Fusion]:
        for node in self.graph.nodes:
            if (same := passes_through(node) or self.plus_zero(node)) is not None:
                self.replace(node, same)
        norms = [node for node in self.graph.nodes if _is_batch_norm(node)]
        # Last to first: if the outputs of two batch norms are added, the later one takes the other as its residual.
        fusions = [self.fuse(node) for node in reversed(norms)][::-1]
        self.graph.lint()
        self.module.recompile()
        return fusions

    def note(self, node: Node) -> None:
        for place in memory([node]):
            self.views.setdefault(place, []).append(node)

    def computes(self, norm: Node, last: Node) -> None:
        """Makes ``norm`` compute the result of ``last``."""
        norm.meta["example_value"] = value(last)
        self.note(norm)
        self.replace(last, norm)

    def replace(self, node: Node, by: Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def plus_zero(self, node: Node) -> Node | None:
        """The batch norm or addition to which ``node`` adds zero, as sum() does, if nothing else reads it."""
        call = call_of(node)
        if call is None or call.name != "add" or len(node.all_input_nodes) != 1:
            return None
        (input,) = node.all_input_nodes
        is_zero = [operand for operand in call.operands if operand is not input] == [0]
        before = call_of(input)
        is_new = _is_batch_norm(input) or (before is not None and before.name == "add" and not before.in_place)
        return input if is_zero and is_new and len(input.users) == 1 and alike(value(node), value(input)) else None

    # ------------------------------------------------------------------------------------------ one batch norm

    def fuse(self, node: Node) -> Fusion:
        name = self.name(node)
        fused: list[str] = []
        on_kernels = False
        if self.only not in (None, name):
            return Fusion(name, (), "is not to be fused", on_kernels)
        try:
            norm = self.as_ours(node)
            on_kernels = has_kernels(value(norm).device)
            if activation_of(norm) is None:
                fused += self.addition(norm)
            fused += self.activation(norm)
        except _ObstacleError as obstacle:
            return Fusion(name, tuple(fused), str(obstacle), on_kernels)
        return Fusion(name, tuple(fused), "", on_kernels)

    def as_ours(self, node: Node) -> Node:
        """A call of our operator that does what ``node`` does, by keywords."""
        given: dict[str, Any] = {**dict(zip(_TORCHS.get(node.target, _ARGUMENTS), node.args)), **node.kwargs}
        norm = node
        if node.target in _TORCHS:
            self.check(given.get("input"), node)
            with self.graph.inserting_before(node):
                norm = self.graph.call_function(operator)
            norm.meta = node.meta
            self.computes(norm, node)
            given = {**_DEFAULTS, **given}
            given["num_batches_tracked"] = self.counter(norm, given)
        norm.args, norm.kwargs = (), {name: given.get(name) for name in _ARGUMENTS}
        return norm

    def check(self, input: Any, node: Node) -> None:
        """Whether our operator gives what torch's batch norm of ``input`` gives."""
        given = value(input) if isinstance(input, Node) else None
        if type(given) is not FakeTensor or type(value(node)) is not FakeTensor:
            raise _ObstacleError("its input is no plain tensor")
        if not has_kernels(given.device):
            raise _ObstacleError(f"there are no kernels for {given.device.type}")
        if not given.is_floating_point() or given.dim() < 2:
            raise _ObstacleError(f"there are no kernels for {given.dtype} of {given.dim()} dimensions")
        with given.fake_mode:
            if not alike(_C.empty_output(given), value(node)):
                raise _ObstacleError("torch lays its output out in another way")

    def counter(self, norm: Node, given: Mapping[str, Any]) -> Node | None:
        """The counter of batches. The operator increments it, and torch's call that does so before is removed."""
        mean = given.get("running_mean")
        if given["training"] is not True or not isinstance(mean, Node):
            return None
        # The names of buffers that Dynamo gives differ in this alone only if one module has both.
        name = mean.name.replace("running_mean", "num_batches_tracked")
        for node in self.graph.find_nodes(op="call_method", target="add_"):
            counter, *amount = node.args
            if counter.name != name or amount != [1] or node.kwargs or node.users or not node < norm:
                continue
            if value(counter).dtype == torch.int64 and not any(n in counter.users for n in between(node, norm)):
                self.graph.erase_node(node)
                return counter
        return None

    def addition(self, norm: Node) -> list[str]:
        """Makes ``norm`` add the residual, if an addition follows."""
        addition = reader(norm)
        call = None if addition is None else call_of(addition)
        if addition is None or call is None or call.name != "add":
            return []
        self.check_free(norm, "residual")
        if call.options["alpha"] != 1:
            raise _ObstacleError("what is added is scaled")
        others = [operand for operand in call.operands if operand is not norm]
        if len(others) != 1 or not isinstance(others[0], Node):
            raise _ObstacleError("what is added is no other tensor")
        (residual,) = others
        if not alike(value(norm), value(residual)) or not alike(value(norm), value(addition)):
            raise _ObstacleError("what is added differs in shape, type or layout")
        if call.in_place and call.operands[0] is residual and not self.is_private(residual, addition):
            raise _ObstacleError("it is added in place to a tensor that others read")
        self.join(norm, addition, residual)
        norm.update_kwarg("residual", residual)
        self.computes(norm, addition)
        return ["add"]

    def activation(self, norm: Node) -> list[str]:
        """Makes ``norm`` apply the activation that follows."""
        activation = activation_of(norm)
        if activation is None:
            raise _ObstacleError(self.what_follows(norm))
        self.check_free(norm)
        last = activation.calls[-1]
        if not alike(value(norm), value(last)):
            raise _ObstacleError(f"its {activation.name} is of another type or layout")
        if not all(map(only_computes, between(norm, last))):
            raise _ObstacleError("gradient mode, autocast or a nested graph is between it and the activation")
        residual = norm.kwargs["residual"]
        is_read = value(last).requires_grad and _C.backward_chain(activation.name, residual=True)[0]
        if is_read and isinstance(residual, Node) and self.may_be_written(residual, norm):
            raise _ObstacleError("what is added may be written to before the backward, which reads it")
        norm.update_kwarg("activation", activation.name)
        norm.update_kwarg("activation_param", activation.param)
        self.computes(norm, last)
        for node in reversed(activation.calls[:-1]):
            self.graph.erase_node(node)
        return [activation.name]

    def check_free(self, norm: Node, *names: str) -> None:
        if norm.kwargs["activation"] not in (None, "identity"):
            raise _ObstacleError("has an activation already")
        if norm.kwargs["mask"] is not None:  # behind it, what follows would have to be 0 too
            raise _ObstacleError("has a mask")
        if any(norm.kwargs[name] is not None for name in names):
            raise _ObstacleError(f"has a {names[0]} already")

    # ------------------------------------------------------------------------------------------ what is in between

    def join(self, norm: Node, addition: Node, residual: Node) -> None:
        """Leaves ``norm`` where it is if the residual is there and does not change; else moves it to the addition."""
        passed = list(between(norm, addition))
        if not all(map(only_computes, passed)):
            raise _ObstacleError("gradient mode, autocast or a nested graph is between it and the addition")
        if residual < norm and not self.written_by(passed, [residual]):
            return
        read = [argument for argument in norm.kwargs.values() if isinstance(argument, Node)]
        statistics = [argument for name in _STATISTICS if isinstance(argument := norm.kwargs[name], Node)]
        if self.written_by(passed, read) or any(memory(statistics) & memory(n.all_input_nodes) for n in passed):
            raise _ObstacleError("its input or what is added is written to before the addition")
        addition.prepend(norm)

    def written_by(self, nodes: Iterable[Node], targets: list[Node]) -> bool:
        """Whether ``nodes`` may write to ``targets``; arguments may be views of other inputs."""
        if memory(targets) & memory(self.inputs):
            targets = targets + self.arguments
        return any(writes(node, targets) for node in nodes)

    def is_private(self, tensor: Node, until: Node) -> bool:
        """Whether after ``until`` nobody reads the memory of ``tensor``, but through the result of ``until``."""
        views = [node for place in memory([tensor]) for node in self.views[place] if node < until]
        are_made_here = all(node.op in ("call_function", "call_method") for node in views)
        return are_made_here and not any(until < user for node in views for user in node.users)

    def may_be_written(self, tensor: Node, norm: Node) -> bool:
        """Whether the graph after ``norm``, or code after the graph, may write to ``tensor``."""
        (output,) = self.graph.find_nodes(op="output")
        places = memory([tensor])
        if places & (memory(self.inputs) | memory(output.all_input_nodes)):
            return True
        readers = {user for place in places for view in self.views[place] for user in view.users if norm < user}
        return self.written_by(readers, [tensor])

    # ------------------------------------------------------------------------------------------ in words

    def what_follows(self, norm: Node) -> str:
        following = reader(norm)
        if following is None:
            return f"its output is read {len(norm.users)} times" if norm.users else "its output is not read"
        if following.op == "output":
            return "its output is returned"
        is_added = _is_batch_norm(following) and following.kwargs.get("residual") is norm
        if is_added:
            return f"{self.name(following)} adds it"
        name = name_of(following)
        has_form = name.removesuffix("_") in activations.NAMES  # with other arguments than here
        return f"{name} follows, which {'in this form is not fused' if has_form else 'has no fused form'}"

    def name(self, node: Node) -> str:
        """The path of the module that calls it."""
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        if not stack:
            return node.name
        key, (source, kind) = stack[-1]
        path = self.names.get(key.partition("@")[0], _path(source))
        is_norm = isinstance(kind, type) and issubclass(kind, (_BatchNorm, Ours))
        return path if is_norm else f"{path}.{node.name}".removeprefix(".")


def _path(source: str) -> str:
    """``layers.0.bn`` of ``L['self']._modules['layers'][0].bn``."""
    below = re.sub(r"^\w+\['\w+'\]", "", source)
    return ".".join(part for part in re.findall(r"\w+", below) if part != "_modules")


def _is_batch_norm(node: Node) -> bool:
    return node.op == "call_function" and (node.target in _TORCHS or node.target in (operator, operator.default))
