"""Folds the batch norms of an exported program, which are calls of functions in its graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from bn_ext.graph.folding.layers import Affine, LayerCall, absorbed, batch_norm_call, drops_nothing, layer_call


class _ObstacleError(Exception):
    """Why a batch norm is not folded."""


class Nodes:
    """A copy of the graph of a program, in which batch norms are folded."""

    def __init__(self, program: ExportedProgram) -> None:
        self.original = program
        self.module = copy.deepcopy(program.graph_module)
        self.graph = self.module.graph
        for node, old in zip(self.graph.nodes, program.graph.nodes, strict=True):
            node.name = old.name  # a copy may get another, but the signature has these
        self.signature = copy.deepcopy(program.graph_signature)
        self.tensors = {**program.constants, **program.state_dict}  # each is an input of the graph

    def fold(self) -> list[tuple[str, str, str]]:
        """Folds what can be folded. Gives for each batch norm its name, and the layer's name or the obstacle."""
        found = []
        for node in list(self.graph.nodes):
            given = batch_norm_call(node.target, node.args, node.kwargs) if node.op == "call_function" else None
            if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
                given = {"running_mean": node.args[3]}
            if given is None:
                continue
            name = self._name(given["running_mean"]) or node.name
            name = name.removesuffix("running_mean").rstrip("._") or name
            try:
                found.append((name, self._fold(node, given), ""))
            except _ObstacleError as obstacle:
                found.append((name, "", str(obstacle)))
        return found

    def program(self) -> ExportedProgram:
        self.module.recompile()
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

    def _fold(self, norm: fx.Node, given: dict[str, Any]) -> str:
        """Gives the name of the layer."""
        node, call = _layer(norm, given)
        layer = call._replace(weight=self._tensor(call.weight, "the weight"), bias=self._tensor(call.bias, "the bias"))
        settings = [given[name] for name in ("running_mean", "running_var", "weight", "bias")]
        mean, var, scale, shift = (self._tensor(setting, "what it normalizes by") for setting in settings)
        computed = Affine(mean, var, scale, shift, given["eps"])
        weight, bias = str(self._name(call.weight)), self._name(call.bias)
        if any(len(parameter.users) > 1 for parameter in (call.weight, call.bias) if parameter is not None):
            raise _ObstacleError(f"it follows {node.name}, which shares parameters")
        users = {user for setting in settings if setting is not None for user in setting.users}
        if any(batch_norm_call(user.target, user.args, user.kwargs) is None for user in users):
            raise _ObstacleError("its parameters or statistics are used elsewhere too")
        if any(type(p) is not nn.Parameter for p in (layer.weight, layer.bias) if p is not None):
            raise _ObstacleError(f"it follows {node.name}, whose parameters are no plain ones")
        if node.meta["val"].dim() != layer.rank or layer.channels != computed.mean.numel():
            raise _ObstacleError(f"it does not normalize the {layer.channels} features of {node.name}")
        parameters = absorbed(layer, computed)
        if parameters is None:
            raise _ObstacleError("the folded parameters would not be finite")
        self.tensors[weight] = parameters[0]
        if bias is not None:
            self.tensors[bias] = parameters[1]
        else:
            self._give_bias(node, call.weight, parameters[1])
        self._take_out(norm, given["input"], settings)
        return weight.removesuffix("weight").rstrip("._") or weight

    def _spec(self, node: Any) -> InputSpec | None:
        specs = self.signature.input_specs
        return next((s for s in specs if node.op == "placeholder" and getattr(s.arg, "name", None) == node.name), None)

    def _name(self, node: Any) -> str | None:
        """Finds what a node stands for, if that is a tensor of the program."""
        spec = self._spec(node) if isinstance(node, fx.Node) else None
        return None if spec is None else spec.target

    def _tensor(self, node: Any, what: str) -> Any:
        name = self._name(node)
        if node is not None and name is None:
            raise _ObstacleError(f"{what} is computed")
        return None if name is None else self.tensors[name]

    def _give_bias(self, layer: fx.Node, weight: fx.Node, bias: Tensor) -> None:
        name = str(self._name(weight)).removesuffix("weight") + "bias"
        while name in self.tensors:
            name += "_"
        self.tensors[name] = bias
        with self.graph.inserting_after(weight):
            node = self.graph.placeholder("p_" + name.replace(".", "_"))
        node.meta["val"] = weight.meta["val"].fake_mode.from_tensor(bias, static_shapes=True)
        specs = self.signature.input_specs
        specs.insert(
            specs.index(self._spec(weight)) + 1,  # type: ignore[arg-type]
            InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name),
        )
        layer.args = (*layer.args[:2], node, *layer.args[3:])

    def _take_out(self, norm: fx.Node, input: fx.Node, settings: list[Any]) -> None:
        """Removes a batch norm, and the tensors that nothing else reads."""
        counter = str(self._name(settings[0])).removesuffix("running_mean") + "num_batches_tracked"
        unused = [*settings, *(node for node in self.graph.nodes if self._name(node) == counter)]
        self.signature.replace_all_uses(norm.name, input.name)
        norm.replace_all_uses_with(input)
        self.graph.erase_node(norm)
        for node in unused:
            if node is not None and not node.users:
                spec: Any = self._spec(node)
                self.signature.input_specs.remove(spec)
                self.tensors.pop(spec.target, None)
                self.graph.erase_node(node)


def _layer(norm: fx.Node, given: dict[str, Any]) -> tuple[fx.Node, LayerCall]:
    """The call whose output a batch norm alone reads."""
    if "input" not in given:
        raise _ObstacleError("the program is decomposed, fold it before run_decompositions()")
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
