"""Sees which layers and batch norms a model calls, and what reads the outputs of the layers."""

from __future__ import annotations

import inspect
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bn_ext.graph.folding.layers import (
    Affine,
    LayerCall,
    affine,
    altered,
    batch_norm_call,
    drops_nothing,
    is_batch_norm,
    is_known,
    layer_call,
)

_EVERY_MODULES = ("forward", "named_modules", "named_children")  # attributes that tell nothing of a batch norm
_NOT_THE_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


@dataclass(eq=False)
class Output:
    """The output of a call of a layer's function."""

    call: LayerCall
    readers: list[Any] = field(default_factory=list)  # batch norms as modules, others by name
    rank: int | None = None  # if known
    storage: Any = None  # while it is held, no other tensor takes its place
    value: Callable[[], object] = lambda: None  # the output itself, while something holds it


class NormCall(NamedTuple):
    module: nn.Module
    source: Output | str  # what it follows
    plain: bool  # whether its input is its only argument
    affine: Affine | None  # None if the call computes something else too


@dataclass
class _Body:
    """The forward of a batch norm, while it runs."""

    module: Any
    normalized: list[Any] = field(default_factory=list)  # outputs of batch norm functions with the module's statistics
    affine: Affine | None = None


class Watch:
    """A run shows this of ``model``, which is changed: it is a copy made for this.

    ===================  =============================================  =====================================
    seen by              what is called or read                         what it notes
    ===================  =============================================  =====================================
    ``_operator``        operators of tensors, in a run                 readers of outputs and of parameters
    ``read_nodes``       nodes of a graph, after a trace                the same
    ``_function``        functions of tensors or of values of a trace   leads to the next two
    ``_layer``           the functions of layers                        outputs
    ``_normalization``   batch norm functions in forwards               what an unknown forward computes
    ``_seen``            forwards of batch norms                        calls
    ``_attribute``       attributes of batch norms                      that others use its parameters
    ===================  =============================================  =====================================
    """

    function = "fold"  # of ours, for messages

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.altered = {module for module in self.paths if altered(module)}
        self.norms = [module for module in self.paths if is_batch_norm(module)]
        self.outputs: list[Output] = []
        self.calls: list[NormCall] = []
        self.elsewhere: set[int] = set()  # ids of parameters and buffers that something else reads
        self.failed: dict[str, str] = {}  # paths of modules that could not be traced, with the reasons
        self.asked: Exception | None = None  # for what the module that is traced asks, and no trace tells
        self._made: dict[Any, Output | str] = {}  # what made a value
        self._reading: list[tuple[Any, set[int]]] = [("", set())]  # who reads now, and what of this is its own
        self._nodes: dict[fx.Node, tuple[Any, set[int]]] = {}  # the same for nodes of traces
        self._bodies: list[_Body] = []
        for module in self.norms:
            module.forward = self._seen(module, module.forward)
            _tell(module, self._attribute)
        for module in self.paths:
            _give_bias(module)
        self._tensors = {id(tensor) for module in self.paths for tensor in tensors(module)}

    # ------------------------------------------------------------------------------------------ ways to see

    def run(self, *args: Any, **kwargs: Any) -> None:
        with self.watching(), located("a copy of the model", self.function):
            outputs = self.model(*args, **kwargs)
        self.find_kept()
        del outputs  # which hold what is returned until then

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _Operators(self), _Functions(self):
            yield

    def attempt(self, module: nn.Module, traced: Callable[[], Any]) -> tuple[Any] | None:
        """The result of a trace of ``module``. A trace that fails leaves nothing behind in what was seen."""
        outputs, calls, asked = len(self.outputs), len(self.calls), self.asked
        self.asked = None
        try:
            result = traced()
            if self.asked is None:
                return (result,)
            raise self.asked
        except Exception as error:
            del self.outputs[outputs:], self.calls[calls:]
            if module in self.paths:  # not one that was made on the way
                self.failed[self.paths[module]] = f"{_place(error)}{error}"
            return None
        finally:
            self.asked = asked

    def find_kept(self) -> None:
        for output in self.outputs:
            if output.value() is not None:
                output.readers.append("whoever holds it")

    def read_nodes(self, graph: fx.Graph, root: nn.Module) -> None:
        named = *root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)
        held = {name: id(tensor) for name, tensor in named}
        for node in graph.nodes:
            reader, own = self._nodes.get(node, (node.name, set()))
            for input in node.all_input_nodes:
                self._read(input, reader)
                if input.target in held:
                    self.elsewhere |= {held[str(input.target)]} - own

    # ------------------------------------------------------------------------------------------ what is seen

    def _attribute(self, module: nn.Module, name: str) -> None:
        """An attribute of a batch norm, which is gone when it is folded, is read or set."""
        inside = any(body.module is module for body in self._bodies)
        if not inside and not name.startswith("_") and name not in _EVERY_MODULES:
            self.elsewhere |= {id(tensor) for tensor in tensors(module)}

    def _operator(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A call of an operator with tensors."""
        reader, own = self._reading[-1]
        for tensor in inputs:
            self._read(tensor, reader or name)
            if id(tensor) in self._tensors and id(tensor) not in own:
                self.elsewhere.add(id(tensor))
        for tensor in outputs:
            if not isinstance(self._made.get(key_of(tensor)), Output):
                self._made[key_of(tensor)] = name

    def _function(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call of one of torch's functions, with tensors or in a trace."""
        if drops_nothing(function, args, kwargs) and isinstance(args[0], Proxy):
            return args[0]  # as torch does with a tensor
        layer = layer_call(function, args, kwargs)
        if layer is not None:
            return self._layer(layer, lambda: function(*args, **kwargs))
        norm = batch_norm_call(function, args, kwargs) if self._bodies else None
        if norm is not None:
            return self._normalization(norm, lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    def _layer(self, call: LayerCall, function: Callable[[], Any]) -> Any:
        own = {id(call.weight), id(call.bias)}
        with self._reads(call.name, own):
            value = function()
        if isinstance(value, Proxy):
            self._nodes[value.node] = call.name, own
            output = Output(call)
        else:
            storage = _storage(value) if type(value) is Tensor else None
            if storage is None:  # what becomes of the output is not seen
                self.elsewhere |= own
                return value
            output = Output(call, rank=value.dim(), storage=storage)
        output.value = weakref.ref(value)
        self.outputs.append(output)
        self._made[key_of(value)] = output
        return value

    def _normalization(self, given: dict[str, Any], function: Callable[[], Any]) -> Any:
        """A batch norm function in the forward of a batch norm."""
        body = self._bodies[-1]
        if any(given[name] is not getattr(body.module, name) for name in ("running_mean", "running_var")):
            return function()
        own = {id(tensor) for tensor in tensors(body.module)}
        with self._reads(body.module, own):
            value = function()
        if isinstance(value, Proxy):
            self._nodes[value.node] = body.module, own
        body.normalized.append(value)
        settings = (given["weight"], given["bias"])
        fixed = given["training"] is False and all(s is None or id(s) in own for s in settings)
        plain = all(given.get(name) is None for name in ("residual", "activation", "mask"))
        if fixed and plain:
            body.affine = Affine(given["running_mean"], given["running_var"], *settings, given["eps"])
        return value

    def _seen(self, module: nn.Module, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a batch norm, to be put in the place of ``inner``."""
        own = {id(tensor) for tensor in tensors(module)}
        signature = inspect.signature(inner)
        known = is_known(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = [*signature.bind(*args, **kwargs).arguments.values()]
            self._bodies.append(_Body(module))
            try:
                if inputs and isinstance(inputs[0], (Proxy, Tensor)):
                    return normalize(*inputs, args=args, kwargs=kwargs)
                return inner(*args, **kwargs)
            finally:
                self._bodies.pop()

        def normalize(input: Any, *others: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            traced = isinstance(input, Proxy)
            source = self._made.get(key_of(input)) or (input.node.name if traced else "an input")
            if any(_same(other, input) for other in others):
                self._read(input, "itself")
            if known and traced:
                output = input.tracer.create_proxy("call_module", self.paths[module], args, kwargs)
                self._nodes[output.node] = module, own
            else:
                with self._reads(module, own) if known else nullcontext():
                    output = inner(*args, **kwargs)
            body = self._bodies[-1]
            whole = not others and len(body.normalized) == 1 and _same(body.normalized[0], output)
            computed = affine(module) if known else body.affine if whole else None
            self.calls.append(NormCall(module, source, not others, computed))
            return output

        return forward

    def _read(self, value: Any, reader: Any) -> None:
        output = self._made.get(key_of(value))
        if isinstance(output, Output):
            output.readers.append(reader)

    @contextmanager
    def _reads(self, reader: Any, own: set[int]) -> Iterator[None]:
        self._reading.append((reader, own))
        try:
            yield
        finally:
            self._reading.pop()


class _Functions(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.watch._function(func, args, kwargs or {})


class _Operators(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        inputs, outputs = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in ((args, kwargs), result))
        self.watch._operator(func.overloadpacket.__name__, inputs, outputs)
        return result


def _tell(module: nn.Module, ask: Callable[[nn.Module, str], None]) -> None:
    """Makes a module call ``ask`` for each of its attributes that is read or set."""
    base = type(module)

    def get(self: nn.Module, name: str) -> Any:
        ask(self, name)
        return base.__getattribute__(self, name)

    def set_(self: nn.Module, name: str, value: Any) -> None:
        ask(self, name)
        base.__setattr__(self, name, value)

    names = {"__module__": base.__module__, "__getattribute__": get, "__setattr__": set_}
    module.__class__ = type.__new__(type(base), base.__name__, (base,), names)


def _give_bias(module: nn.Module) -> None:
    """Gives a layer without a bias one of zeros, so that its calls show whether they pass it on."""
    if not isinstance(module, (_ConvNd, nn.Linear)) or module.bias is not None:
        return
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        module.bias = nn.Parameter(weight.new_zeros(channels), requires_grad=False)


def tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of ``module`` itself."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


@contextmanager
def located(model: str, function: str = "fold") -> Iterator[None]:
    """Adds to an error which model fails, and where."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(f"bn_ext.{function}: {_place(error)}{model} fails with these inputs")
        raise


def _place(error: BaseException) -> str:
    """The line of the model where ``error`` arose."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_THE_MODELS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


def key_of(value: Any) -> Any:
    """A key that is the same for values that share memory."""
    if isinstance(value, Proxy):
        return value.node
    if isinstance(value, Tensor):
        storage = _storage(value)
        return id(value) if storage is None else storage._cdata
    return value if isinstance(value, fx.Node) else None


def _storage(tensor: Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except Exception:  # of tensors that have none
        return None


def _same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, Proxy) and isinstance(other, Proxy) and one.node is other.node)
