"""A forward saves outputs of batch norms as what they are made of. The backward makes them again.

Autograd saves a convolution's input, which is a batch norm's output, and the batch norm's own input. While a
:class:`Recording` is open, the operator tells it of each output, and autograd hands it each tensor to save. An output
is saved as a call: one element-wise pass over the batch norm's input, which makes the same bits again. So are the
results of cheap functions of outputs, where a graph has them call :func:`recorded`. Other tensors are saved as they
are, or by the hooks around the recording.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._C import _autograd
from torch.autograd import Variable

from bn_ext._capture import never_captured_in
from bn_ext._load import _C
from bn_ext._processes import in_group

_MOST_CHAINED = 8  # results of which each is made of the one before. Not measured.
_WRITTEN = "was modified by an inplace operation after the forward"
_NOTHING: tuple[Any, Any] = (None, None)
_open = threading.local()  # its recording: the innermost of the thread
_hooks = _autograd._top_saved_tensors_default_hooks  # the innermost, the only ones that autograd calls
_takes_hooks: Callable[[], bool] = _autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------- what is kept


class _Saved:
    """A tensor, and the version of it that was saved."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # An alias, because a tensor holds the node that made it, and that node may hold what is saved here.
        self.tensor = tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach()
        self.version = tensor._version

    def saver(self) -> _Saved:
        return self

    def written(self) -> str:
        """How the tensor was written to since."""
        return f"{_WRITTEN}: it is at version {self.tensor._version}, not {self.version}"

    def unpack(self) -> Tensor:
        if self.tensor._version != self.version:
            kind, sizes = self.tensor.type(), list(self.tensor.shape)
            raise _WrittenError(
                f"one of the variables needed for gradient computation, {kind} {sizes}, {self.written()}"
            )
        return self.tensor


class _WrittenError(RuntimeError):
    """A saved tensor was written to."""


class _Shared:
    """A tensor to be made for the backward, once for all that saved it. It is freed when the last of them has it."""

    def __init__(self, tensor: Tensor) -> None:
        self.version = tensor._version
        self.device = tensor.device if tensor.is_cuda else None
        self.savers: list[ref[_Saver]] = []
        self.made_in: Any = None  # the last backward that it was made in

    def make(self) -> Tensor:
        raise NotImplementedError

    def saver(self) -> _Saver:
        return _Saver(self)

    def made_for(self, saver: _Saver) -> Tensor:
        """The tensor, made by the first saver that asks in a backward, which hands it to the others."""
        task = torch._C._current_graph_task_id()
        if task < 0:  # outside a backward someone looks at a node
            return self.make()
        # A reader on another stream would not wait for this stream, so it gets a tensor of its own.
        now = task, 0 if self.device is None else torch.cuda.current_stream(self.device).stream_id
        given_in, made = saver.given
        saver.given = _NOTHING
        if given_in == now:
            return made
        made = self.make()
        if self.made_in != now and len(self.savers) > 1:
            self.made_in = now
            others = [other for reference in [*self.savers] if (other := reference()) not in (None, saver)]
            for other in others:
                other.given = now, made
            Variable._execution_engine.queue_callback(partial(_forget, [ref(other) for other in others]))
        return made


def _forget(savers: list[ref[_Saver]]) -> None:
    """Frees what was handed to savers that did not ask for it in the backward, which ends."""
    for reference in savers:
        if (saver := reference()) is not None:
            saver.given = _NOTHING


class _Saver:
    """One place where a shared tensor, or a view of it, is saved."""

    __slots__ = ("__weakref__", "given", "shared", "view")

    def __init__(self, shared: _Shared, view: tuple[Any, ...] | None = None) -> None:
        self.shared = shared
        self.view = view  # sizes, strides, offset
        self.given = _NOTHING  # the backward in which another saver had the tensor made, and the tensor
        shared.savers.append(ref(self, shared.savers.remove))

    def unpack(self) -> Tensor:
        made = self.shared.made_for(self)
        return made if self.view is None else made.as_strided(*self.view)


class _Packed(_Shared):
    """A tensor that the hooks around the recording save."""

    def __init__(self, tensor: Tensor, hooks: tuple[Callable[..., Any], Callable[..., Any]]) -> None:
        super().__init__(tensor)
        pack, self.unpack = hooks
        self.packed = pack(tensor)

    def make(self) -> Tensor:
        return self.unpack(self.packed)


class _Made(_Shared):
    """The result of ``function(*args)``, in which :class:`_Saved` and :class:`_Saver` stand for tensors."""

    def __init__(self, result: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], name: Any) -> None:
        super().__init__(result)
        self.dtype = result.dtype
        self.function = function
        self.args = args
        self.name = name  # called for the name in an error, with the place of an argument
        before = (one.shared for one in _flat(args) if isinstance(one, _Saver))
        self.length: int = 1 + max((one.length for one in before if isinstance(one, _Made)), default=0)

    def make(self) -> Tensor:
        try:
            args = [_value(one) for one in self.args]
        except _WrittenError:
            for place, one in enumerate(_flat(self.args)):
                if isinstance(one, _Saved) and one.tensor._version != one.version:
                    error = f"bn_ext.train.recompute_outputs: the {self.name(place)} {one.written()}"
                    raise RuntimeError(error) from None
            raise
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.function(*args)
        return self.function(*args)


def _flat(args: tuple[Any, ...]) -> Iterator[Any]:
    for one in args:
        yield from one if isinstance(one, (list, tuple)) else (one,)


def _replaced(argument: Any, saved: dict[int, Any]) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_replaced(one, saved) for one in argument]
    return saved.get(id(argument), argument)


def _value(argument: Any) -> Any:
    kind = type(argument)
    if kind is _Saved or kind is _Saver or kind is _Parameter:
        return argument.unpack()
    return [_value(one) for one in argument] if kind is list else argument


class _Parameter(_Saved):
    """A parameter of which the values are kept apart: where processes share it, it may be away in the backward."""

    __slots__ = ("values",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.values = tensor.detach().clone()

    def unpack(self) -> Tensor:
        super().unpack()
        return self.values


# ---------------------------------------------------------------------------------------------- the recording


def _again(*args: Any) -> Tensor:
    return torch.ops.bn_ext.batch_norm_elemt.default(*args)[0]


# The nodes of max pooling, and the dimensions of their results, images included.
_POOLS = {"MaxPool2DWithIndicesBackward0": 4, "MaxPool3DWithIndicesBackward0": 5}


def _picked(input: Tensor, places: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The result of max pooling, of the places of its values in each image and channel."""
    picked = input.flatten(2).gather(2, places.flatten(2)).view(places.shape)
    if picked.stride() == tuple(strides):
        return picked
    return torch.empty_strided(picked.shape, strides, dtype=input.dtype, device=input.device).copy_(picked)


def _relu(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*args).relu_()


def _cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return parameter.to(dtype)


_NAMES = ("input", "weight", "bias", "mean", "invstd", "residual")  # of the arguments of batch_norm_elemt


def _name_of(owner: ref[nn.Module], parameters: list[Tensor], channels: int, place: int) -> str:
    """``weight of the batch norm layer1.bn``: by the path of the module, if it has parameters."""
    model = owner()
    for path, parameter in () if model is None else model.named_parameters():
        if any(parameter is one for one in parameters):
            return f"{_NAMES[place]} of the batch norm {path.rpartition('.')[0]}"
    return f"{_NAMES[place]} of a batch norm of {channels} channels"


def _path_of(owner: ref[nn.Module], parameter: Tensor, place: int) -> str:
    model = owner()
    paths = () if model is None else model.named_parameters()
    return f"parameter {next((path for path, one in paths if one is parameter), 'of the model')}"


class Recording:
    """Saves outputs of ours as what they are made of while it is open, on the thread that opened it."""

    def __init__(self, owner: ref[nn.Module], chains: bool) -> None:
        self.owner = owner
        self.longest = _MOST_CHAINED if chains else 1
        self.made: dict[int, tuple[ref[Tensor], _Made]] = {}  # by the id of a tensor, as long as it lives
        self.kept: dict[int, tuple[ref[Tensor], ref[Any]]] = {}  # what another tensor was last saved as

    def __enter__(self) -> None:
        self.hooks = _hooks(False)
        self.before = getattr(_open, "recording", None)
        self.pack = self.save  # one object, to be found among the hooks
        self.parameter = _Parameter if in_group() else _Saved
        _autograd._push_saved_tensors_default_hooks(self.pack, _unpack)
        _open.recording = self
        _C.observe_outputs(self.observe)

    def __exit__(self, *_: object) -> None:
        _C.observe_outputs(None if self.before is None else self.before.observe)
        _open.recording = self.before
        _autograd._pop_saved_tensors_default_hooks()
        # The graph holds the hooks, and so this object.
        self.made.clear()
        self.kept.clear()
        del self.pack, self.hooks, self.before

    def is_innermost(self) -> bool:
        """Whether no hooks inside the recording take its place."""
        hooks = _hooks(False)
        return hooks is not None and hooks[0] is self.pack

    def observe(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        residual: Tensor | None,
        activation: int,
        param: float,
        set_size: int | None,
        mask: Tensor | None,
        keeps_residual: bool,
    ) -> bool:
        """Is told of an output whose input the backward keeps. Returns whether autograd may save the call's tensors by
        itself, which is faster: they are kept as they are."""
        if type(output) is not Tensor or not self.is_innermost():
            return False
        saved = self.save(input)
        saved_residual = None
        if residual is not None:
            # Nothing is kept that was not kept before: else this output is.
            saved_residual = self.save(residual) if keeps_residual else self.saved_as(residual)
        if residual is None or saved_residual is not None:
            parameters = [t for t in (weight, bias) if t is not None]
            name = partial(_name_of, self.owner, parameters, mean.size(-1))
            affine = (None if t is None else self.parameter(t) for t in (weight, bias))
            args = (saved, *affine, mean, invstd, saved_residual, activation, param, set_size, False, mask)
            self.add(output, _Made(output, _again, args, name))
        is_made = type(saved) is _Saver or (keeps_residual and type(saved_residual) is _Saver)
        return self.hooks is None and not is_made

    def note(self, result: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        """Is told of the result of a cheap function. It is made again if most of what it reads is."""
        if type(result) is not Tensor or not result.requires_grad or not self.is_innermost():
            return
        tensors = [one for one in _flat(args) if isinstance(one, Tensor)]
        saved = {id(one): self.saved_as(one) for one in tensors}
        more = [one for one in tensors if saved[id(one)] is None]  # would be kept for this result alone
        is_less = 2 * sum(one.nbytes for one in more) <= result.nbytes
        is_made = any(type(one) is _Saver and type(one.shared) is _Made for one in saved.values())
        is_alike = all(one.dtype == result.dtype for one in tensors)  # autocast is not there in the backward
        if not (is_less and is_made and is_alike) or (more and self.hooks is not None):
            return
        saved |= {id(one): _Saved(one) for one in more}
        node: Any = result.grad_fn
        if self.hooks is None and _POOLS.get(node.name()) == result.dim():
            # The node keeps the places of the largest values: to read there is faster than to find them again.
            function, args = _picked, (args[0], node._saved_result1, result.stride())
        name = f"input of {getattr(function, '__name__', function)}"
        self.add(result, _Made(result, function, tuple(_replaced(one, saved) for one in args), lambda _: name))

    def add(self, tensor: Tensor, made: _Made) -> None:
        if made.length <= self.longest:
            key, results = id(tensor), self.made
            results[key] = (ref(tensor, lambda _: results.pop(key, None)), made)

    def save(self, tensor: Tensor) -> _Saved | _Saver:
        """Is called by autograd with a tensor to save, and gives what to keep in its place."""
        if tensor.is_leaf and self.hooks is None:
            return _Saved(tensor)
        return self.saved_as(tensor) or self.keep(tensor)

    def saved_as(self, tensor: Tensor) -> Any:
        """The stand-in of a tensor that costs no memory: its recipe, or the tensor that another node keeps; or None."""
        base = tensor._base
        whole = tensor if base is None else base
        _, made = self.made.get(id(whole), _NOTHING)
        if made is not None and made.version == tensor._version and made.dtype == tensor.dtype:
            return _Saver(made, None if base is None else (tensor.shape, tensor.stride(), tensor.storage_offset()))
        if (base is None and self.is_relu(tensor, made)) or (made is None and self.is_cast(whole)):
            return self.saved_as(tensor)
        of, reference = self.kept.get(id(tensor), _NOTHING)
        if of is None or of() is not tensor or (kept := reference()) is None or kept.version != tensor._version:
            return None
        return kept.saver()

    def is_relu(self, tensor: Tensor, before: _Made | None) -> bool:
        """Whether the tensor, which was made as ``before`` if it was, is now torch's ReLU of an output: it is noted."""
        node = tensor.grad_fn
        if node is None or node.name() != "ReluBackward0":
            return False
        if before is not None:  # in place, if that was the only write
            if before.version + 1 != tensor._version:
                return False
        else:
            of = node.next_functions[0][0]
            read = ((one(), made) for one, made in reversed(self.made.values()))
            is_read = (made for one, made in read if one is not None and one.grad_fn is of)
            before = next(is_read, None)
            if before is None:
                return False
        self.add(tensor, _Made(tensor, partial(_relu, before.function), before.args, before.name))
        return self.made[id(tensor)][1].version == tensor._version

    def is_cast(self, tensor: Tensor) -> bool:
        """Whether the tensor is a parameter in another type, as autocast makes it for a convolution: it is noted."""
        node = tensor.grad_fn
        if node is None or node.name() != "ToCopyBackward0" or tensor._version or self.parameter is _Parameter:
            return False
        parameter = getattr(node.next_functions[0][0], "variable", None)  # of the node that accumulates its gradient
        if type(parameter) is not nn.Parameter or parameter.shape != tensor.shape or parameter.dtype == tensor.dtype:
            return False
        name = partial(_path_of, self.owner, parameter)
        self.add(tensor, _Made(tensor, _cast, (_Saved(parameter), tensor.dtype), name))
        return True

    def keep(self, tensor: Tensor) -> _Saved | _Saver:
        kept = _Saved(tensor) if self.hooks is None else _Packed(tensor, self.hooks)
        self.kept[id(tensor)] = ref(tensor), ref(kept)
        return kept.saver()


def _unpack(saved: _Saved | _Saver) -> Tensor:
    return saved.unpack()


def recording(owner: ref[nn.Module], chains: bool) -> AbstractContextManager[None]:
    """A :class:`Recording` of a call of a model, if there is anything to record that is not being recorded."""
    if (
        not torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or not _takes_hooks()  # a transform of torch.func
    ):
        return nullcontext()
    hooks = _hooks(False)
    is_recorded = hooks is not None and isinstance(getattr(hooks[0], "__self__", None), Recording)
    return nullcontext() if is_recorded else Recording(owner, chains)


def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function``, whose results a recording may make again: cheap, without random numbers, and writing to nothing."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        if (recording := getattr(_open, "recording", None)) is not None:
            recording.note(result, partial(function, **kwargs) if kwargs else function, args)
        return result

    call.__name__ = f"recorded_{getattr(function, '__name__', 'function')}"  # how it is called in a graph's code
    return call


never_captured_in(globals())  # autograd calls them between captured graphs
