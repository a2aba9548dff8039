"""Batch norm folded into the convolution or linear layer before it, for evaluation."""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from bn_ext import modules
from bn_ext._trace import Tracer, altered
from bn_ext.functional import finished

# The layers that can take a batch norm in, and the rank of their output if its dimension 1, which a batch norm
# normalizes, is the one that their weight makes: a linear layer takes any rank, a convolution a single example too.
_RANK: dict[type, int] = {
    nn.Linear: 2,
    **dict.fromkeys((nn.Conv1d, nn.ConvTranspose1d), 3),
    **dict.fromkeys((nn.Conv2d, nn.ConvTranspose2d), 4),
    **dict.fromkeys((nn.Conv3d, nn.ConvTranspose3d), 5),
}

# The batch norms that can be folded, and the ranks that they take.
_RANKS: dict[type, tuple[int, ...]] = {
    nn.SyncBatchNorm: (2, 3, 4, 5),
    **dict.fromkeys((nn.BatchNorm1d, modules.BatchNorm1d, modules.BatchNormAct1d), (2, 3)),
    **dict.fromkeys((nn.BatchNorm2d, modules.BatchNorm2d, modules.BatchNormAct2d), (4,)),
    **dict.fromkeys((nn.BatchNorm3d, modules.BatchNorm3d, modules.BatchNormAct3d), (5,)),
}


_BATCH_NORMS = (_BatchNorm, modules.BatchNormAct)
_AnyBatchNorm: TypeAlias = _BatchNorm | modules.BatchNormAct


_SIMPLE = (type(None), bool, int, float, str)  # what torch.fx compares with what is given later


class Fold(NamedTuple):
    """What became of one batch norm."""

    batch_norm: str  # its path in the model
    into: str  # the path of the layer that holds it now; empty if it is still there
    reason: str  # why it is

    def __str__(self) -> str:
        return f"{self.batch_norm}: " + (f"folded into {self.into}" if self.into else f"not folded ({self.reason})")


def fold(model: nn.Module, example_inputs: tuple[Any, ...] | Tensor | None = None) -> fx.GraphModule:
    """``model`` for evaluation, each batch norm folded into the convolution or linear layer before it.

    The layers are :class:`torch.nn.Linear`, ``Conv1d``, ``2d``, ``3d`` and ``ConvTranspose1d``, ``2d``, ``3d``. Their
    new weight and bias are computed in float64 and have the dtype, device and requires_grad of the weight, and its
    memory format. A residual and an activation of a batch norm of ours remain, in torch's operators. Whatever is in
    doubt stays as it is, and so does what has hooks, with all that is in it.

    Where only the rank of the input tells what is normalized (by ``BatchNorm1d`` after ``Linear``: the features of
    (N, C), the positions of (N, L, C)), the folded model asserts that it is the one for which folding is right.

    Args:
        model: in evaluation mode, and such that :mod:`torch.fx` can trace it. It is not changed, and shares with the
            result all but the folded layers.
        example_inputs: positional arguments, or the only one, on which to hold the result's outputs to those of
            ``model``. A forward may do what tracing does not see (``isinstance(x, Tensor)``): give them.
            Optional arguments that are not among them keep their defaults, and the result refuses others.

    Returns:
        A graph module. Its ``folds`` hold one :class:`Fold` for each batch norm, to look at or
        ``print(*folded.folds, sep="\\n")``.

    Raises:
        ValueError: a model or a batch norm in training mode.
        torch.fx.proxy.TraceError: a model that cannot be traced.
        AssertionError: outputs that are off by more than rounding explains.
    """
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, _BATCH_NORMS)):
            raise ValueError(f"fold: {name or 'the model'} is in training mode, call model.eval() first")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    folded = _trace(model, len(inputs or ()))
    vars(folded)["folds"] = _fold(folded, model)
    if inputs is not None:
        _check(folded, model, inputs)
    return folded


class _Tracer(Tracer):
    """Keeps every batch norm whole, and what has hooks: traced through, they would run once, on proxies."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BATCH_NORMS) or altered(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, inputs: int) -> fx.GraphModule:
    """The graph of ``model``, with its hooks, as a module that shares all that is in ``model``. Of the arguments of its
    forward, the first ``inputs`` and all without a default are inputs."""
    name = type(model).__name__
    if "forward" in vars(model):
        raise TraceError(f"fold: {name} has a forward set on the object, which is not traced")
    try:
        root = copy.copy(model)  # constants that tracing meets become attributes of it
        parameters = list(inspect.signature(model.forward).parameters.values())
        defaults = {p.name: p.default for p in parameters[inputs:] if isinstance(p.default, _SIMPLE)}
        traced = fx.GraphModule(root, _Tracer().trace(root, defaults), name)
    except Exception as error:
        raise TraceError(f"fold: {name} cannot be traced: {error}") from error
    vars(traced).update((kind, copy.copy(hooks)) for kind, hooks in vars(model).items() if "hook" in kind)
    for module in traced.modules():
        if type(module) is nn.Module:  # a container made just now, in training mode
            module.training = False
    return traced


def _arguments(call: fx.Node) -> dict[str, Any]:
    """Of a batch norm or the layer before it."""
    return {**dict(zip(("input", "residual", "activation", "activation_param"), call.args)), **call.kwargs}


def _fold(folded: fx.GraphModule, model: nn.Module) -> list[Fold]:
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BATCH_NORMS)}
    uses = _uses(folded, model)
    pairs: dict[tuple[str, str, Any], list[fx.Node]] = defaultdict(list)  # a batch norm after the same: its calls
    for node in folded.graph.find_nodes(op="call_module"):
        if node.target in norms:
            source = _arguments(node)["input"]
            pairs[node.target, source.op, source.target].append(node)
    folds = [_fold_pair(folded, name, norms[name], nodes, uses) for (name, *_), nodes in pairs.items()]
    unseen = norms.keys() - {name for name, *_ in pairs}
    folds += [Fold(name, "", "not called, or inside a module that is not traced") for name in sorted(unseen)]
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folds


def _uses(folded: fx.GraphModule, model: nn.Module) -> Counter[int]:
    """By id, how often each module is called, on its own or within another, and each parameter is held or fetched."""
    called = (folded.get_submodule(node.target) for node in folded.graph.find_nodes(op="call_module"))
    uses = Counter(id(part) for module in called for part in module.modules())
    uses.update(id(p) for module in model.modules() for p in module._parameters.values())
    uses.update(id(attrgetter(node.target)(folded)) for node in folded.graph.find_nodes(op="get_attr"))
    return uses


def _fold_pair(
    folded: fx.GraphModule, name: str, norm: _AnyBatchNorm, nodes: list[fx.Node], uses: Counter[int]
) -> Fold:
    """Folds the batch norm of these calls into the layer that all of them follow, unless something is against it."""
    sources = [_arguments(node)["input"] for node in nodes]
    before = str(sources[0].target)
    layer = folded.get_submodule(before) if sources[0].op == "call_module" else None
    obstacle = next(_obstacles(norm, layer, nodes, sources, uses), None)
    if obstacle is None:
        absorbed = _absorbed(layer, norm)
        if not all(parameter.isfinite().all() for parameter in absorbed.parameters()):
            obstacle = "the folded parameters would not be finite"
    if obstacle is not None:
        return Fold(name, "", obstacle)
    folded.set_submodule(before, absorbed)
    for node, source in zip(nodes, sources, strict=True):
        if len(_RANKS[type(norm)]) > 1:
            _assert_rank(source, _RANK[type(layer)], f"{before} holds {name}, folded")
        _replace(node, source, norm)
    return Fold(name, before, "")


def _obstacles(
    norm: _AnyBatchNorm, layer: Any, nodes: list[fx.Node], sources: list[fx.Node], uses: Counter[int]
) -> Iterator[str]:
    """What is against folding. Each assumes that nothing before it is."""
    follows = f"it follows {sources[0].name}"
    if type(norm) not in _RANKS:
        yield f"a {type(norm).__name__} may have a forward of its own"
    if layer is None or type(layer) not in _RANK:
        yield f"{follows}, no plain convolution or linear layer"
    for module in norm, layer:
        if altered(module):
            yield f"this {type(module).__name__} has hooks or a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        yield "it has no running statistics"
    for parameter in layer.parameters():
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            yield f"{follows}, whose parameters are no plain tensors or have no values"
    if uses[id(layer)] > len(nodes) or any(uses[id(parameter)] > 1 for parameter in layer.parameters()):
        yield f"{follows}, which is called elsewhere too or shares parameters"
    if any(len(source.users) > 1 for source in sources) or any(
        _arguments(node).get("residual") is source for node, source in zip(nodes, sources, strict=True)
    ):
        yield f"{follows}, whose output is used elsewhere too"
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if _RANK[type(layer)] not in _RANKS[type(norm)] or channels != norm.num_features:
        yield f"it does not normalize the {channels} features of {sources[0].name}"


def _absorbed(layer: Any, norm: Any) -> nn.Module:
    """A copy of ``layer`` that gives what ``norm`` makes of its output."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float64)  # not every device has float64

    scale = (exact(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.running_mean) if layer.bias is None else exact(layer.bias) - exact(norm.running_mean)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + exact(norm.bias)
    scales = scale[:, None]
    if getattr(layer, "transposed", False):  # (inputs, outputs of a group, ...), the inputs group by group
        scales = scale.view(layer.groups, -1).repeat_interleave(layer.in_channels // layer.groups, 0)
    weight = exact(layer.weight) * scales[(..., *[None] * (layer.weight.dim() - 2))]

    absorbed, trained = copy.deepcopy(layer), layer.weight.requires_grad
    absorbed.weight = nn.Parameter(torch.empty_like(layer.weight).copy_(weight), trained)
    absorbed.bias = nn.Parameter(shift.to(layer.weight), trained)
    return absorbed


def _operand(node: fx.Node | None) -> Any:
    """Stands for the tensor of ``node``: functions called on it add to the graph."""
    return node if node is None else fx.Proxy(node)


def _assert_rank(call: fx.Node, rank: int, what: str) -> None:
    with call.graph.inserting_before(call):
        is_it = _operand(_arguments(call)["input"]).dim() == rank
        torch._assert(is_it, f"{what} for inputs of {rank} dimensions alone")


def _replace(call: fx.Node, source: fx.Node, norm: _AnyBatchNorm) -> None:
    """Puts what follows the normalization in the place of the call of ``norm``."""
    given = _arguments(call)
    options = vars(norm) if isinstance(norm, modules.BatchNormAct) else given
    activation, param = (options.get(name) for name in ("activation", "activation_param"))
    with call.graph.inserting_before(call):
        output: Any = finished(_operand(source), _operand(given.get("residual")), activation, param)
    call.replace_all_uses_with(output.node)
    call.graph.erase_node(call)


def _check(folded: nn.Module, model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Holds the outputs to half the digits of their type, beside the largest of them."""
    with torch.no_grad():
        (actual, form), (expected, expected_form) = (
            pytree.tree_flatten(m(*copy.deepcopy(inputs))) for m in (folded, model)
        )
    if form != expected_form:
        raise AssertionError(f"fold: the folded model returns {form}, the model {expected_form}")
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(other, Tensor) and other.is_floating_point() and other.numel():
            tolerance = torch.finfo(other.dtype).eps ** 0.5 * other.abs().max().item()
            torch.testing.assert_close(
                one, other, rtol=0, atol=tolerance, equal_nan=True, msg=f"fold: output {i} differs: {{}}".format
            )
