"""The way of values to the batch norms of a model: which calls made their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

from bn_ext import activation as activations
from bn_ext.graph.folding.layers import dropped, ranks
from bn_ext.graph.folding.watch import Output, Watch, key_of

# Names are compared without underscores and case: functions, methods, and classes of modules in traces.
_LAYERS = {"linear", *(f"conv{kind}{d}d" for kind in ("", "transpose") for d in (1, 2, 3))}
_ACTIVATIONS = {name.replace("_", "") for name in activations.NAMES if name != "identity"} | {
    *("hardtanh", "logsigmoid", "prelu", "rrelu", "selu", "softplus", "softsign", "swish", "threshold")
}
_SHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "contiguous"}
_TYPES = {"to", "float", "half", "bfloat16", "double", "clone", "detach", "identity"}
_BETWEEN = _SHAPES | _TYPES | {"dropout", "dropout1d", "dropout2d", "dropout3d"}
_POOLS = ("maxpool", "avgpool", "adaptive")
_BATCH_NORM = "a batch norm"


@dataclass(eq=False)
class Step:
    """A call that made a value."""

    name: str
    inputs: tuple[Step, ...] = ()  # the calls that made its inputs
    drops: float = 0  # the probability of a dropout before the value, and after the last batch norm


class Input(NamedTuple):
    """The input of a call of a batch norm."""

    module: nn.Module
    source: Step | None
    shape: torch.Size | None  # if known


class Flow(Watch):
    """Sees besides what made the inputs of batch norms. Its model is in training, with batch norms in evaluation."""

    function = "train.diagnose"

    def __init__(self, model: nn.Module) -> None:
        self.steps: dict[Any, Step] = {}  # by what a value is known by: its memory, or a node
        self.inputs: list[Input] = []
        super().__init__(model)

    # ------------------------------------------------------------------------------------------ what is seen

    def attempt(self, module: nn.Module, traced: Callable[[], Any]) -> tuple[Any] | None:
        inputs = len(self.inputs)
        result = super().attempt(module, traced)
        if result is None:
            del self.inputs[inputs:]
        return result

    def _function(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        read = _values((args, kwargs))
        inputs = tuple(filter(None, map(self._step, read)))  # before the call, which may write to them
        value = super()._function(function, args, kwargs)
        drops = dropped(function, args, kwargs) or 0
        name = getattr(getattr(function, "overloadpacket", function), "__name__", "")
        step = Step(_spelled(name), inputs, drops or _dropped_before(inputs))
        is_other = drops > 0 or step.name in _ACTIVATIONS or _writes(name)
        views = set() if is_other else set(map(key_of, read))  # the views of an input are the same value
        self.steps.update(dict.fromkeys(set(map(key_of, _values(value))) - views, step))
        return value

    def _seen(self, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        seen = super()._seen(module, inner)
        signature = inspect.signature(inner)

        def forward(*args: Any, **kwargs: Any) -> Any:
            for input in _values([*signature.bind(*args, **kwargs).arguments.values()][:1]):
                shape = None if isinstance(input, Proxy) else input.shape
                self.inputs.append(Input(module, self._step(input), shape))
            output = seen(*args, **kwargs)
            self.steps.update(dict.fromkeys(map(key_of, _values(output)), Step(_BATCH_NORM)))
            return output

        return forward

    def _step(self, value: Any) -> Step | None:
        return self._of_node(value.node) if isinstance(value, Proxy) else self.steps.get(key_of(value))

    def _of_node(self, node: fx.Node) -> Step:
        """The step of a node of a trace. A trace calls modules of torch whole, and shows none of their functions."""
        if node not in self.steps:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            inputs = tuple(map(self._of_node, node.all_input_nodes))
            self.steps[node] = Step(_spelled(name), inputs, _dropped_before(inputs))
        return self.steps[node]

    # ------------------------------------------------------------------------------------------ what follows

    def useless_biases(self, where: Callable[[nn.Module], bool]) -> Iterator[tuple[nn.Module, str]]:
        """The layers with the names of the biases that batch norms, for which ``where`` holds, subtract again."""
        places = {id(p): (module, name) for module in self.paths for name, p in module._parameters.items()}
        for bias, (module, name) in places.items():
            outputs = [output for output in self.outputs if id(output.call.bias) == bias]
            if outputs and bias not in self.elsewhere and all(self._subtracted(output, where) for output in outputs):
                yield module, name

    def _subtracted(self, output: Output, where: Callable[[nn.Module], bool]) -> bool:
        """Whether nothing but a batch norm reads an output, and normalizes the layer's channels."""
        norms = {call.module for call in self.calls if call.source is output}
        if len(norms) != 1 or set(output.readers) != norms:
            return False
        (norm,) = norms
        rank, mean = output.call.rank, norm._buffers["running_mean"]
        fits = output.call.bias.numel() == (norm.num_features if mean is None else mean.numel())
        return where(norm) and fits and rank in ranks(norm) and output.rank in (None, rank)


def nonlinearity_before(step: Step | None) -> str:
    """The name of the activation of a layer's output that a value is, perhaps pooled; empty if it is none."""
    step = _made(step)
    if step is None or step.name not in _ACTIVATIONS:
        return ""
    layer = _made(step.inputs[0]) if step.inputs else None
    return step.name if layer is not None and layer.name in _LAYERS else ""


def _made(step: Step | None) -> Step | None:
    """The last step that did more than to change shape or type, to pool or to drop."""
    while step is not None and (step.name in _BETWEEN or step.name.startswith(_POOLS)):
        step = step.inputs[0] if step.inputs else None
    return step


def _dropped_before(inputs: tuple[Step, ...]) -> float:
    return max((step.drops for step in inputs), default=0)


def _values(tree: Any) -> list[Any]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, (Proxy, Tensor))]


def _spelled(name: str) -> str:
    return name.replace("_", "").lower()


def _writes(name: str) -> bool:
    """Whether a function of this name writes to its first argument: ``add_``, ``__iadd__``."""
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")
