"""Forwards for the batch norms of other libraries. Each calls the operator once."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Proxy
from torch.jit import is_scripting, is_tracing

from bn_ext import activation as activations
from bn_ext._fallback import fell_back
from bn_ext.functional import EXPORTED, exporting, finished, operator
from bn_ext.graph.folding.layers import altered
from bn_ext.nn.base import FusedForward

# The operator's activations by the full names of modules, so that no package is imported.
_ACTIVATIONS: dict[str, activations.Name] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.ELU": "elu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Hardswish": "hardswish",
    "torch.nn.modules.activation.Hardsigmoid": "hardsigmoid",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.Mish": "mish",
    "torch.nn.modules.activation.CELU": "celu",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations.HardSigmoid": "hardsigmoid",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.Tanh": "tanh",
    "timm.layers.activations.Mish": "mish",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations_me.SwishMe": "silu",  # its kin have other gradients at the kinks
    "timm.layers.activations_me.MishMe": "mish",
}


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class WithActivation(nn.Module):
    """A batch norm with the modules ``drop`` and ``act`` of timm's classes: ``act(drop(batch_norm(x)))``."""

    drop: nn.Module
    act: nn.Module

    def _activation(self) -> tuple[activations.Name, float | None] | None:
        """The name and parameter of the activation, or None if the operator cannot do what ``drop`` and ``act`` do."""
        drop, act = self.drop, self.act
        name = _ACTIVATIONS.get(full_name(type(act)))
        if name is None or type(drop) is not nn.Identity or altered(drop) or altered(act):
            return None
        if name == "gelu" and (approximate := getattr(act, "approximate", "none")) != "none":
            return ("gelu_tanh", None) if approximate == "tanh" else None
        return name, getattr(act, activations.PARAMETERS[name]) if name in activations.PARAMETERS else None


class BatchNormAct2d(WithActivation, FusedForward):
    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():
            if isinstance(x, Proxy):
                return self._traced(x)
            activation = self._activation()
            if activation is not None:
                return self._fused(x, None, activation[0], activation[1])
        return self.act(self.drop(self._fused(x, None, None, None)))


class FrozenBatchNorm2d(nn.Module):
    """Torchvision's batch norm of buffers only, which normalizes by the running statistics in training too."""

    eps: float
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._frozen(x, None, None)

    def _frozen(self, x: Tensor, activation: activations.Name | None, activation_param: float | None) -> Tensor:
        if self._fits(x):
            return operator(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                None,
                False,
                0.0,
                self.eps,
                None,
                activation,
                activation_param,
            )
        if not is_scripting():  # noqa: SIM102
            if not isinstance(x, Proxy):
                fell_back(x, EXPORTED if exporting() else "the input is not (N, C, H, W) of the frozen tensors' dtype")
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        output = x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        if not is_scripting():
            output = finished(output, None, activation, activation_param)
        return output

    def _fits(self, x: Tensor) -> bool:
        """Whether the operator takes ``x``. The original also broadcasts, promotes, and is traced and exported."""
        if not is_scripting():
            if isinstance(x, Proxy) or exporting():
                return False
            if x.dim() != 4 or (not is_tracing() and x.size(1) != self.running_mean.numel()):
                return False
        for tensor in (self.weight, self.bias, self.running_mean, self.running_var):
            if tensor.dtype != x.dtype:
                return False
        return x.dim() == 4


class FrozenBatchNorm2dOfTransformers(FrozenBatchNorm2d):
    __constants__ = ["eps"]  # noqa: RUF012
    eps = 1e-5


class FrozenBatchNormAct2d(WithActivation, FrozenBatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():
            activation = self._activation()
            if activation is not None:
                return self._frozen(x, activation[0], activation[1])
        return self.act(self.drop(self._frozen(x, None, None)))
