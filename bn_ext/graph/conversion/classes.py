"""Which classes of batch norms have a counterpart of ours, and the counterpart."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import type_before_parametrizations

from bn_ext.graph.conversion import forwards
from bn_ext.graph.conversion.forwards import full_name
from bn_ext.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bn_ext.nn.base import Ours


class _Lazy(Ours):
    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Is called with all arguments of the first call, of which torch's takes the input alone."""
        super().initialize_parameters(input)  # type: ignore[misc]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Is what the first call found before it made the module one of another class."""
        return type(self).forward(self, input, *args, **kwargs)


class LazyBatchNorm1d(_Lazy, nn.LazyBatchNorm1d):
    cls_to_become = BatchNorm1d  # type: ignore[assignment]


class LazyBatchNorm2d(_Lazy, nn.LazyBatchNorm2d):
    cls_to_become = BatchNorm2d  # type: ignore[assignment]


class LazyBatchNorm3d(_Lazy, nn.LazyBatchNorm3d):
    cls_to_become = BatchNorm3d  # type: ignore[assignment]


# :func:`counterpart` adds to these.
_OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.LazyBatchNorm1d: LazyBatchNorm1d,
    nn.LazyBatchNorm2d: LazyBatchNorm2d,
    nn.LazyBatchNorm3d: LazyBatchNorm3d,
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


class UnlikeError(Exception):
    """Why a class or a module has no counterpart of ours."""


class Counterpart(Ours):
    """A class of ours made from another's, whose instances differ from the other's in forward and repr alone."""

    _original: ClassVar[type[nn.Module]] = nn.Module

    def __repr__(self) -> str:
        text = super().__repr__()  # some classes have a repr of their own, without extra_repr
        return text if "bn_ext" in text or not text.endswith(")") else f"{text[:-1]}, bn_ext)"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles the module as its original class does; unpickling makes the counterpart again."""
        _, _, *state = tuple(super().__reduce_ex__(max(protocol, 2)))
        return _blank, (type(self)._original,), *state


def _blank(original: type) -> nn.Module:
    cls = counterpart(original)
    return cls.__new__(cls)


# The class of ours whose forward replaces theirs, by patterns of full names, so that no package is imported.
_RECOGNIZED: dict[str, type[nn.Module]] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": BatchNorm1d,
    "torch.nn.modules.batchnorm.BatchNorm2d": BatchNorm2d,
    "torch.nn.modules.batchnorm.BatchNorm3d": BatchNorm3d,
    "timm.layers.norm_act.BatchNormAct2d": forwards.BatchNormAct2d,
    "timm.layers.norm_act.FrozenBatchNormAct2d": forwards.FrozenBatchNormAct2d,
    "torchvision.ops.misc.FrozenBatchNorm2d": forwards.FrozenBatchNorm2d,
    "transformers.models.*.modeling_*.*FrozenBatchNorm2d": forwards.FrozenBatchNorm2dOfTransformers,
}


class _Plain:
    """A class with the attributes that every class has."""

    attribute: int


# Names that a subclass may define and still compute what its base computes.
_HARMLESS = {
    *vars(_Plain),
    "__constants__",
    "__init__",
    "__repr__",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "_version",
    "extra_repr",
    "reset_parameters",
    "reset_running_stats",
    "train",
}
_SAMPLE = nn.BatchNorm1d(1)
_STATE = {*vars(_SAMPLE), *_SAMPLE._parameters, *_SAMPLE._buffers, "drop", "act"}


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` is one by its class, or else by a name of its class or a base, and its buffers."""
    named = any(word in cls.__name__ for cls in type(module).__mro__ for word in ("BatchNorm", "BN"))
    return isinstance(module, _BatchNorm) or (named and "running_mean" in module._buffers)


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, Ours)


def original(cls: type) -> type[nn.Module] | None:
    """The class that has ``cls`` as its counterpart, or None."""
    return vars(cls).get("_original") if issubclass(cls, Counterpart) else _TORCHS.get(cls)


def counterpart(cls: type) -> type[nn.Module]:
    """The class of ours for modules of ``cls``.

    Raises:
        UnlikeError: there is none.
    """
    if cls not in _OURS:
        _OURS[cls] = _derived(cls)
    return _OURS[cls]


def _derived(cls: type) -> type[nn.Module]:
    if issubclass(cls, nn.SyncBatchNorm):
        raise UnlikeError("statistics across processes")
    recognized = ((base, way) for base in cls.__mro__ if (way := _recognized(base)) is not None)
    base, way = next(recognized, (cls, None))
    if way is None:
        raise UnlikeError("a forward of their own")
    if type(cls) is not type:
        raise UnlikeError("a metaclass of their own")
    names = (name for c in cls.__mro__ if c not in base.__mro__ for name in vars(c))
    own = [name for name in names if _matters(name, (base, way, Counterpart))]
    if own:
        raise UnlikeError("a forward of their own" if "forward" in own else f"{', '.join(own)} of their own")
    return type(
        cls.__name__, (Counterpart, way, cls), {"__module__": __name__, "__doc__": cls.__doc__, "_original": cls}
    )


def _recognized(cls: type) -> type[nn.Module] | None:
    return next((way for pattern, way in _RECOGNIZED.items() if fnmatchcase(full_name(cls), pattern)), None)


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Changes the class of ``module`` to ``cls`` and keeps its parametrizations."""
    parametrized = type(module)
    if type_before_parametrizations(module) is not parametrized:
        # Parametrizing made a class for this module, but copies of the module may share it.
        cls = type(parametrized.__name__, (cls,), dict(vars(parametrized)))
    module.__class__ = cls


def _matters(name: str, bases: tuple[type, ...]) -> bool:
    """Whether defining ``name`` may change what these bases compute, or hide the state that they compute it from."""
    return name not in _HARMLESS and (name in _STATE or any(hasattr(base, name) for base in bases))
