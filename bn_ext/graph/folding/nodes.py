"""Folds in a graph the batch norms that are calls of functions: of a graph module or an exported program."""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from bn_ext.graph.folding.layers import Affine, LayerCall, absorbed, batch_norm_call, drops_nothing, layer_call


class Attributes:
    """The tensors of a graph module: attributes of it and of its parts."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph

    def name(self, node: Any) -> str | None:
        """What a node stands for, if that is a tensor of the module."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def tensor(self, name: str) -> Any:
        return attrgetter(name)(self.module)

    def has(self, name: str) -> bool:
        owner, _, attribute = name.rpartition(".")
        return getattr(self.module.get_submodule(owner), attribute, None) is not None

    def put(self, name: str, tensor: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(self.module.get_submodule(owner), attribute, tensor)

    def add(self, name: str, tensor: Tensor, beside: fx.Node) -> fx.Node:
        self.put(name, tensor)
        with self.graph.inserting_after(beside):
            return self.graph.get_attr(name)

    def readers(self, name: str) -> int:
        own = sum(len(node.users) for node in self.graph.find_nodes(op="get_attr") if node.target == name)
        called = self.graph.find_nodes(op="call_module")
        return own + sum(name.startswith(f"{node.target}.") for node in called)

    def remove(self, node: fx.Node) -> None:
        name = str(node.target)
        self.graph.erase_node(node)
        if not self.readers(name):
            owner, _, attribute = name.rpartition(".")
            delattr(self.module.get_submodule(owner), attribute)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)


class Placeholders:
    """The tensors of an exported program: inputs of its graph. The program stays as it is."""

    def __init__(self, program: ExportedProgram) -> None:
        self.original = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        for node, old in zip(self.graph.nodes, program.graph.nodes, strict=True):
            node.name = old.name  # a copy may get another, but the signature has these
        self.signature = copy.deepcopy(program.graph_signature)
        self.tensors = {**program.constants, **program.state_dict}

    def _spec(self, node: Any) -> InputSpec | None:
        specs = self.signature.input_specs
        return next((s for s in specs if node.op == "placeholder" and getattr(s.arg, "name", None) == node.name), None)

    def name(self, node: Any) -> str | None:
        spec = self._spec(node) if isinstance(node, fx.Node) else None
        return None if spec is None else spec.target

    def tensor(self, name: str) -> Any:
        return self.tensors[name]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def put(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor

    def add(self, name: str, tensor: Tensor, beside: fx.Node) -> fx.Node:
        with self.graph.inserting_after(beside):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        node.meta["val"] = beside.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        specs = self.signature.input_specs
        specs.insert(
            specs.index(self._spec(beside)) + 1,  # type: ignore[arg-type]
            InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name),
        )
        self.put(name, tensor)
        return node

    def readers(self, name: str) -> int:
        return sum(len(node.users) for node in self.graph.find_nodes(op="placeholder") if self.name(node) == name)

    def remove(self, node: fx.Node) -> None:
        spec = self._spec(node)
        self.signature.input_specs.remove(spec)  # type: ignore[arg-type]
        self.tensors.pop(spec.target, None)  # type: ignore[union-attr, arg-type]
        self.graph.erase_node(node)

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        self.signature.replace_all_uses(node.name, by.name)
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def program(self) -> ExportedProgram:
        old = self.original
        constants = {name: value for name, value in self.tensors.items() if name in old.constants}
        return ExportedProgram(
            self.module,
            self.graph,
            self.signature,
            {name: value for name, value in self.tensors.items() if name not in constants},
            old.range_constraints,
            old.module_call_graph,
            old.example_inputs,
            constants,
            verifiers=old.verifiers,
        )


class _ObstacleError(Exception):
    """Why a batch norm is not folded."""


def fold_nodes(place: Attributes | Placeholders) -> list[tuple[str, str, str]]:
    """Folds what can be folded. Gives for each batch norm its name, what it is folded into, or else why it is not."""
    found = []
    for node in list(place.graph.nodes):
        given = batch_norm_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None
        if given is None:
            continue
        name = place.name(given["running_mean"]) or node.name
        name = name.removesuffix("running_mean").rstrip("._") or name
        try:
            found.append((name, _fold_node(place, node, given), ""))
        except _ObstacleError as obstacle:
            found.append((name, "", str(obstacle)))
    place.module.recompile()
    return found


def _fold_node(place: Attributes | Placeholders, norm: fx.Node, given: dict[str, Any]) -> str:
    """Gives the name of the layer."""
    node, call = _layer(norm, given)

    def tensor(argument: Any, what: str) -> Any:
        name = place.name(argument)
        value = None if name is None else place.tensor(name)
        if argument is not None and not isinstance(value, Tensor):
            raise _ObstacleError(f"{what} is computed")
        return value

    layer = call._replace(weight=tensor(call.weight, "the weight"), bias=tensor(call.bias, "the bias"))
    computed = Affine(
        tensor(given["running_mean"], "its mean"),
        tensor(given["running_var"], "its variance"),
        tensor(given["weight"], "its weight"),
        tensor(given["bias"], "its bias"),
        given["eps"],
    )
    weight, bias = str(place.name(call.weight)), place.name(call.bias)
    if any(place.readers(name) > 1 for name in (weight, bias) if name is not None):
        raise _ObstacleError(f"it follows {node.name}, which shares parameters")
    if any(type(p) is not nn.Parameter for p in (layer.weight, layer.bias) if p is not None):
        raise _ObstacleError(f"it follows {node.name}, whose parameters are no plain ones")
    example = node.meta.get("val", node.meta.get("example_value"))
    if (example is not None and example.dim() != layer.rank) or layer.channels != computed.mean.numel():
        raise _ObstacleError(f"it does not normalize the {layer.channels} features of {node.name}")
    parameters = absorbed(layer, computed)
    if parameters is None:
        raise _ObstacleError("the folded parameters would not be finite")

    if example is None:
        with place.graph.inserting_before(norm):
            is_it = fx.Proxy(node).dim() == layer.rank
            torch._assert(is_it, f"{node.name} holds {norm.name}, folded for inputs of {layer.rank} dimensions alone")
    place.put(weight, parameters[0])
    if bias is not None:
        place.put(bias, parameters[1])
    else:
        _give_bias(place, node, call, parameters[1])
    _take_out(place, norm, given)
    return weight.removesuffix("weight").rstrip("._") or weight


def _layer(norm: fx.Node, given: dict[str, Any]) -> tuple[fx.Node, LayerCall]:
    """The call whose output a batch norm alone reads."""
    node, reader = given["input"], norm
    while (
        node.op == "call_function" and drops_nothing(node.target, node.args, node.kwargs) and {*node.users} == {reader}
    ):
        node, reader = node.args[0], node
    call = layer_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None
    if call is None:
        raise _ObstacleError(f"it follows {node.name}, no plain convolution or linear layer")
    if given["training"] is not False or any(given.get(name) is not None for name in ("residual", "activation")):
        raise _ObstacleError("it uses the statistics of its batch, or has a residual or an activation")
    if {*node.users} != {reader}:
        raise _ObstacleError(f"it follows {node.name}, whose output is used elsewhere too")
    return node, call


def _give_bias(place: Attributes | Placeholders, node: fx.Node, call: LayerCall, bias: Tensor) -> None:
    name = str(place.name(call.weight)).removesuffix("weight") + "bias"
    while place.has(name):
        name += "_"
    added = place.add(name, bias, beside=call.weight)
    if len(node.args) > 1:
        node.args = (*node.args[:2], added, *node.args[3:])
    else:
        node.update_kwarg("bias", added)


def _take_out(place: Attributes | Placeholders, norm: fx.Node, given: dict[str, Any]) -> None:
    """The batch norm, and the tensors that nothing reads then."""
    counter = str(place.name(given["running_mean"])).removesuffix("running_mean") + "num_batches_tracked"
    unused = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
    unused += [node for node in place.graph.nodes if place.name(node) == counter]
    place.replace(norm, given["input"])
    for node in unused:
        if node is not None and not node.users:
            place.remove(node)
