"""The attributes that fuse and recompute_outputs put on a model, read and removed without loading the compiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from bn_ext._capture import never_captured
from bn_ext.graph.arguments import check_model

if TYPE_CHECKING:
    from bn_ext.graph.fusion.rewrite import Fusion

Model = TypeVar("Model", bound=nn.Module)

# torch calls _compiled_call_impl. Dynamo captures the forward of the class, unless the model has a __call__ of its own.
# The method compile of torch would replace _compiled_call_impl.
_PLACES = ("_compiled_call_impl", "__call__", "compile")


class Own:
    """Replaces a method on one model. A copy of the model gets the method."""

    def __init__(self, model: nn.Module, method: str) -> None:
        self.model = model
        self.method = method

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, self.method)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return getattr(memo.get(id(self.model)), self.method, None)


Around = Callable[[], AbstractContextManager[None]]


class _Surrounded(Own):
    """The call of a model, fused, compiled or plain, in a context of its own."""

    def __init__(self, model: nn.Module, around: Around, call: Any) -> None:
        super().__init__(model, "_call_impl")
        self.around, self.call = around, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.around():
            return (self.call or self.model._call_impl)(*args, **kwargs)


never_captured(_Surrounded.__call__)  # what Dynamo captures is the call inside


class _Compile(Own):
    """``model.compile(...)``: the compiled call takes the place of the one inside the context."""

    def __call__(self, *args: Any, **options: Any) -> None:
        around = surrounding(self.model)
        surround(self.model, None)
        self.model.compile(*args, **options)
        surround(self.model, around)


def surrounding(model: nn.Module) -> Around | None:
    """The context of each call of ``model`` itself."""
    call = model._compiled_call_impl
    return call.around if isinstance(call, _Surrounded) and call.model is model else None


def _inside(model: nn.Module) -> Any:
    """The call that was put on ``model``, without its context."""
    call = model._compiled_call_impl
    return call.call if isinstance(call, _Surrounded) else call


def surround(model: nn.Module, around: Around | None) -> None:
    """Puts each call of ``model`` in a context, or takes the context away."""
    call, own = _inside(model), vars(model)
    own.pop("_compiled_call_impl", None)
    if isinstance(own.get("compile"), (_Compile, MethodType)):  # the latter on a copy
        del own["compile"]
    if around is not None:
        call = _Surrounded(model, around, call)
        own.setdefault("compile", _Compile(model, "compile"))
    if call is not None:
        own["_compiled_call_impl"] = call


def install(model: nn.Module, call: Own, compile: Own) -> None:
    """Puts a call on ``model``, and a method where the model has no attribute of its own."""
    around = surrounding(model)
    surround(model, None)
    uninstall(model)
    own = vars(model)
    own["_compiled_call_impl"] = call
    if type(model).__call__ is nn.Module.__call__:
        own.setdefault("__call__", call)
    own.setdefault("compile", compile)
    surround(model, around)


def uninstall(model: nn.Module) -> None:
    """Takes away what ``install`` put on ``model``, or on what ``model`` is a copy of."""
    around = surrounding(model)
    surround(model, None)
    for name in _PLACES:
        found = vars(model).get(name)
        if isinstance(found, Own) or (isinstance(found, MethodType) and found.__self__ is model):
            del vars(model)[name]
    surround(model, around)


def is_compiled(model: nn.Module) -> bool:
    """Whether something else than ``install`` compiled ``model`` in place."""
    call = _inside(model)
    return not (call is None or isinstance(call, Own) or (isinstance(call, MethodType) and call.__self__ is model))


def installed(model: nn.Module) -> Any:
    """The fused call of ``model`` itself. Copies have none, nor have models that something else compiled since."""
    call = _inside(model)
    return call if isinstance(call, Own) and call.model is model else None


def unfuse(model: Model) -> Model:
    """Undoes :func:`bn_ext.fuse` in ``model`` and in its parts. The batch norms stay ours.

    Args:
        model: any module, fused or not.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = bn_ext.fuse(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        >>> model = bn_ext.graph.unfuse(model)
        >>> bn_ext.graph.fusions(model)
        []
    """
    check_model("graph.unfuse", model)
    for module in model.modules():
        uninstall(module)
    return model


def fusions(model: nn.Module) -> list[Fusion]:
    """Says what became of each call of a batch norm in a model that :func:`bn_ext.fuse` returned.

    Args:
        model: any module.

    Returns:
        One named tuple for each call that was captured so far: ``batch_norm``, the path of its module; ``fused``, what
        the call computes besides, such as ``("add", "relu")``; ``reason``, why no more, or an empty string. A batch
        norm that was in no captured graph has one too. The list is empty if ``model`` is not fused.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> model = bn_ext.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> y = model(torch.randn(2, 3, 8, 8))
        >>> print(*bn_ext.graph.fusions(model), sep="\\n")
        1: relu
    """
    check_model("graph.fusions", model)
    fused = installed(model)
    return [] if fused is None else fused.fusions()
