"""The pairs of a layer and a batch norm that can become one layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from bn_ext.graph.folding.layers import Affine, LayerCall, ranks
from bn_ext.graph.folding.watch import NormCall, Output, Watch, tensors


class Pair(NamedTuple):
    batch_norm: nn.Module
    affine: Affine  # what it computes
    plain: bool  # whether its input is the only argument of all its calls
    layer: LayerCall
    owner: nn.Module  # of the layer's parameters
    names: tuple[str, str]  # of weight and bias in it


class Judgement:
    """Decides what is folded, by what was seen of a model."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        held = [(id(p), m, name) for m in watch.paths for name, p in m._parameters.items() if p is not None]
        self.places = {parameter: (module, name) for parameter, module, name in held}  # by the parameter's id
        self.times = Counter(parameter for parameter, *_ in held)  # that a module holds it

    def pairs(self) -> tuple[list[Pair], dict[str, str]]:
        """The pairs, and the paths of the other batch norms with the reasons why they are in none."""
        pairs, reasons = [], {}
        for module in self.watch.norms:
            calls = [call for call in self.watch.calls if call.module is module]
            reason = next(self._obstacles(module, calls), None)
            if reason is None:
                layer: LayerCall = calls[0].source.call  # type: ignore[union-attr]
                places = self.places[id(layer.weight)], self.places[id(layer.bias)]
                computed: Affine = calls[0].affine  # type: ignore[assignment]
                plain = all(call.plain for call in calls)
                pairs.append(Pair(module, computed, plain, layer, places[0][0], (places[0][1], places[1][1])))
            else:
                reasons[self.watch.paths[module]] = reason
        return pairs, reasons

    def _obstacles(self, module: Any, calls: list[NormCall]) -> Iterator[str]:
        """The reasons against folding. Each assumes that those before it do not hold."""
        if module in self.watch.altered:
            yield f"this {type(module).__name__} has hooks or a forward of its own, or is adapted"
        if module._buffers["running_mean"] is None or module._buffers["running_var"] is None:
            yield "it has no running statistics"
        if not calls:
            yield self._unseen(self.watch.paths[module])
        for call in calls:
            if call.affine is None:
                yield f"the forward of {type(module).__name__} computes more than a batch norm"
            if not isinstance(call.source, Output):
                yield f"it follows {call.source}, no plain convolution or linear layer"
        if any(id(tensor) in self.watch.elsewhere for tensor in tensors(module)):
            yield "its parameters, statistics or settings are used elsewhere too"
        if len({(*map(id, call.affine[:4]), call.affine.eps) for call in calls}) > 1:  # type: ignore[index, union-attr]
            yield "its calls differ in their parameters or settings"
        layers = [call.source.call for call in calls]  # type: ignore[union-attr]
        if any(layer.weight is not layers[0].weight for layer in layers):
            yield "it follows several layers"
        yield from self._obstacles_before(module, layers[0])

    def _obstacles_before(self, module: Any, layer: LayerCall) -> Iterator[str]:
        """The reasons that lie in the layer before all calls of a batch norm."""
        owner = self.places.get(id(layer.weight), (None,))[0]
        if owner is None:
            yield f"it follows {layer.name}, whose weight is computed"
        name = self.watch.paths[owner] or layer.name
        follows = f"it follows {name}"
        if owner in self.watch.altered:
            yield f"{follows}, which has hooks or a forward of its own"
        if any(id(p) in self.watch.elsewhere or self.times[id(p)] > 1 for p in (layer.weight, layer.bias)):
            yield f"{follows}, which shares parameters"
        if self.places.get(id(layer.bias), (None,))[0] is not owner:
            yield f"{follows}, which has no place for a bias of its own"
        if any(type(p) is not nn.Parameter for p in (layer.weight, layer.bias)):
            yield f"{follows}, whose parameters are of another class"
        if any(p.is_meta for p in (layer.weight, layer.bias, *tensors(module))):
            yield f"{follows}, and the parameters of the two have no values"
        outputs = [output for output in self.watch.outputs if output.call.weight is layer.weight]
        if any({*output.readers} != {module} for output in outputs):
            yield f"{follows}, whose output is used elsewhere too"
        if any(output.call.bias is not layer.bias or output.call.name != layer.name for output in outputs):
            yield f"{follows}, whose weight is used in another way too"
        wrong_rank = layer.rank not in ranks(module) or any(out.rank not in (None, layer.rank) for out in outputs)
        if wrong_rank or layer.channels != module._buffers["running_mean"].numel():
            yield f"it does not normalize the {layer.channels} features of {name}"

    def _unseen(self, path: str) -> str:
        above = [part for part in self.watch.failed if f"{path}.".startswith(f"{part}." if part else "")]
        if not above:
            return "it is not called"
        part = max(above, key=len)
        return f"{part or 'the model'} cannot be traced: {self.watch.failed[part]}"
