"""``fold`` knows these layers and batch norms, and the parameters of a layer into which one is folded."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bn_ext import activation as activations
from bn_ext.functional import finished, mask_of, operator
from bn_ext.nn import BatchNorm2d
from bn_ext.nn.activated import BatchNormAct

# The rank of a layer's output in which dimension 1, which a batch norm normalizes, holds the layer's channels. A linear
# layer takes inputs of any rank, a convolution a single example too.
_OUTPUT_RANKS = {"linear": 2, **{f"{kind}{d}d": d + 2 for kind in ("conv", "conv_transpose") for d in (1, 2, 3)}}
_LAYERS = {getattr(place, name): name for name in _OUTPUT_RANKS for place in (F, torch.ops.aten)}
_LAYER_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")

_ATENS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_BATCH_NORMS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _ATENS,
    torch.ops.aten.batch_norm: _ATENS,
    operator: tuple(argument.name for argument in operator.default._schema.arguments),
}
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.ops.aten.dropout)
_OPTIONAL = {"weight": None, "bias": None, "training": False, "eps": 1e-5}

# The ranks that batch norms take, by the method that checks them.
_RANKS: dict[Any, tuple[int, ...]] = {
    nn.BatchNorm1d._check_input_dim: (2, 3),
    nn.BatchNorm2d._check_input_dim: (4,),
    nn.BatchNorm3d._check_input_dim: (5,),
}
_ANY_RANK = (2, 3, 4, 5)
_TORCHS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_OURS = (BatchNorm2d.forward, BatchNormAct.forward)
# Forwards of other packages, by the full name of their class: a batch norm that never uses statistics of the batch, and
# one that is followed by the modules ``drop`` and ``act``.
_FROZEN = re.compile(r"(torchvision\.ops|detectron2\.layers|transformers\.models|bn_ext\.graph)\..*FrozenBatchNorm2d")
_WITH_ACTIVATION = re.compile(
    r"(timm\.layers\.norm_act|bn_ext\.graph\.[\w.]+)\._?(BatchNormAct2d|SyncBatchNormAct|FrozenBatchNormAct2d)"
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayerCall(NamedTuple):
    """The arguments of a layer's function."""

    name: str
    weight: Any
    bias: Any
    groups: int

    @property
    def rank(self) -> int:
        return _OUTPUT_RANKS[self.name]

    @property
    def channels(self) -> int:
        if self.weight.dim() != self.rank:  # F.linear takes a vector
            return 0
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def transposed(self) -> bool:
        return "transpose" in self.name


class Affine(NamedTuple):
    """A batch norm computes this in evaluation."""

    mean: Any
    var: Any
    weight: Any
    bias: Any
    eps: float


def layer_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LayerCall | None:
    name = _LAYERS.get(getattr(function, "overloadpacket", function))
    if name is None:
        return None
    given = {**dict(zip(_LAYER_ARGUMENTS, args)), **kwargs}
    return LayerCall(name, given["weight"], given.get("bias"), given.get("groups", 1))


def batch_norm_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a function that is a batch norm, by name."""
    names = _BATCH_NORMS.get(getattr(function, "overloadpacket", function))
    return None if names is None else {**_OPTIONAL, **dict(zip(names, args)), **kwargs}


def dropped(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float | None:
    """The probability with which a call, if it is a dropout, drops values of its first argument."""
    if getattr(function, "overloadpacket", function) not in _DROPOUTS or not args:
        return None
    given = {"p": 0.5, "training": True, **dict(zip(("", "p", "training"), args)), **kwargs}
    return 0 if given.get("train", given["training"]) is False else given["p"]


def drops_nothing(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a dropout that returns its input, the first argument."""
    return dropped(function, args, kwargs) == 0


def altered(module: nn.Module) -> bool:
    """Whether a call of ``module`` does other things than the forward of its class."""
    adapted = getattr(module, "running_share", 1.0) != 1.0
    return adapted or any(getattr(module, kind) for kind in _HOOKS) or "forward" in vars(module)


def is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, (torch.jit.ScriptModule, _InstanceNorm)):
        return False
    holds_layers = any(isinstance(part, (_ConvNd, nn.Linear)) for part in module.modules())
    return {"running_mean", "running_var"} <= {*module._buffers} and not holds_layers


def _of_others(module: nn.Module, names: re.Pattern[str]) -> bool:
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return names.fullmatch(f"{owner.__module__}.{owner.__qualname__}") is not None


def is_known(module: nn.Module) -> bool:
    """Whether ``module``, a batch norm, has a forward that is known here."""
    known = type(module).forward in (*_TORCHS, *_OURS)
    return known or _of_others(module, _FROZEN) or _of_others(module, _WITH_ACTIVATION)


def affine(module: Any) -> Affine:
    epsilon = getattr(module, "eps", 1e-5)  # which transformers' frozen ones hold in their code
    return Affine(module.running_mean, module.running_var, module.weight, module.bias, epsilon)


def ranks(module: nn.Module) -> tuple[int, ...]:
    """The ranks of the inputs that a batch norm takes."""
    if _of_others(module, _FROZEN) or _of_others(module, _WITH_ACTIVATION):
        return (4,)
    return _RANKS.get(getattr(type(module), "_check_input_dim", module), _ANY_RANK)


class Rest(nn.Module):
    """In the place of a folded batch norm: does what follows the normalization, and refuses inputs of another rank."""

    def __init__(self, folded: str, rank: int | None, activation: activations.Name | None, param: float | None) -> None:
        super().__init__()
        self.folded = folded
        self.rank = rank
        self.activation = activation
        self.activation_param = param

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: activations.Name | None = None,
        activation_param: float | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if self.rank is not None:
            torch._assert(input.dim() == self.rank, f"{self.folded} for inputs of {self.rank} dimensions alone")
        if not torch.jit.is_scripting():
            if self.activation is not None:
                activation, activation_param = self.activation, self.activation_param
            return finished(input, residual, activation, activation_param, mask_of(input, mask, lengths))
        alone = residual is None and activation is None and self.activation is None and mask is None and lengths is None
        torch._assert(alone, "a folded batch norm with a residual, an activation or a mask cannot be scripted")
        return input

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in ("rank", "activation", "activation_param")}
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def rest(module: Any, layer: LayerCall, plain: bool, folded: str) -> nn.Module:
    """Gives what remains of a batch norm that is called with an input only (``plain``) or also with what follows it.

    ``folded`` is for its errors.
    """
    if _of_others(module, _WITH_ACTIVATION):
        return nn.Sequential(OrderedDict(drop=module.drop, act=module.act))
    rank = layer.rank if len(ranks(module)) > 1 else None
    if isinstance(module, BatchNormAct):
        return Rest(folded, rank, module.activation, module.activation_param)
    return nn.Identity() if plain and rank is None else Rest(folded, rank, None, None)


@torch.inference_mode(False)
@torch.no_grad()
def absorbed(layer: LayerCall, norm: Affine) -> tuple[nn.Parameter, nn.Parameter] | None:
    """The weight and bias with which the layer gives what the batch norm makes of its output, if they are finite."""

    def exact(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float64)  # not every device has float64

    scale = (exact(norm.var) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * exact(norm.weight)
    shift = -exact(norm.mean) if layer.bias is None else exact(layer.bias) - exact(norm.mean)
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + exact(norm.bias)
    old = layer.weight
    scales = scale[:, None]
    if layer.transposed:  # (inputs, outputs of a group, ...), the inputs group by group
        scales = scale.view(layer.groups, -1).repeat_interleave(old.shape[0] // layer.groups, 0)
    weight = torch.empty_like(old).copy_(exact(old) * scales[(..., *[None] * (old.dim() - 2))])
    bias = shift.to(weight)
    if not (weight.isfinite().all() and bias.isfinite().all()):
        return None
    return nn.Parameter(weight, old.requires_grad), nn.Parameter(bias, old.requires_grad)
