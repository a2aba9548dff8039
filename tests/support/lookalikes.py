"""Batch norms under the full names of timm's, torchvision's and transformers', none of which the tests need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Mish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * nn.functional.softplus(x).tanh()


class GELUTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x, approximate="tanh")


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None, **options) -> None:
        super().__init__(channels, **options)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / float(self.num_batches_tracked) if self.training and self.track_running_stats else 0.0
        tracked = self.track_running_stats or not self.training
        x = nn.functional.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


class Frozen(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), fill))


class FrozenBatchNorm2d(Frozen):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels)
        self.eps = eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weight)}, eps={self.eps})"

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(
        self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__(channels, eps)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return self.act(
            self.drop(x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale))
        )


class DetrFrozenBatchNorm2d(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


RECOGNIZED = [BatchNormAct2d, FrozenBatchNormAct2d, FrozenBatchNorm2d, DetrFrozenBatchNorm2d]
WITH_ACTIVATION = [BatchNormAct2d, FrozenBatchNormAct2d]
FROZEN = [FrozenBatchNormAct2d, FrozenBatchNorm2d, DetrFrozenBatchNorm2d]

HOMES: dict[type, str] = {
    Swish: "timm.layers.activations",
    Mish: "timm.layers.activations",
    GELUTanh: "timm.layers.activations",
    BatchNormAct2d: "timm.layers.norm_act",
    SyncBatchNormAct: "timm.layers.norm_act",
    FrozenBatchNormAct2d: "timm.layers.norm_act",
    FrozenBatchNorm2d: "torchvision.ops.misc",
    DetrFrozenBatchNorm2d: "transformers.models.detr.modeling_detr",
}


def move_in() -> dict[str, ModuleType]:
    """Gives the classes the names of their models. Returns the modules that hold them, to be put into sys.modules."""
    homes: dict[str, ModuleType] = {}
    for cls, home in HOMES.items():
        parts = home.split(".")
        for name in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            homes.setdefault(name, ModuleType(name))
        cls.__module__ = home
        setattr(homes[home], cls.__name__, cls)
    return homes


@pytest.fixture
def homes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """While it lasts, the classes are found under these names."""
    before = {cls: cls.__module__ for cls in HOMES}
    for name, module in move_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    torch.compiler.reset()
    yield
    for cls, home in before.items():
        cls.__module__ = home


def trained(module: nn.Module) -> nn.Module:
    """With state as after training."""
    with torch.no_grad():
        for name, t in module.state_dict().items():
            if t.is_floating_point():
                t.uniform_(0.5, 2) if "var" in name else t.normal_()
    return module


class Operators(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.name())
        return func(*args, **(kwargs or {}))


def operators(module: nn.Module, *input: Tensor) -> list[str]:
    with Operators() as seen, torch.no_grad():
        module(*input)
    return [name for name in seen.called if name != "aten::detach"]


def is_fused(module: nn.Module, *input: Tensor) -> bool:
    called = operators(module, *input)
    return len(called) == 1 and called[0].startswith("bn_ext::")


def assert_alike(mine: nn.Module, theirs: nn.Module, *shape: int) -> None:
    """Equal outputs, input gradients and state over three steps and an evaluation."""
    for training in (True, True, False):
        inputs = [torch.randn(shape or (4, 3, 5, 2)).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        outputs = [model.train(training)(input) for model, input in zip((mine, theirs), inputs, strict=True)]
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(outputs[0], outputs[1])
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
        torch.testing.assert_close(
            [p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-4, atol=1e-4
        )


if __name__ == "__main__":  # the class of what is pickled in a file, before and after revert
    import copy
    import pickle

    import bn_ext

    sys.modules.update(move_in())
    with open(sys.argv[1], "rb") as file:
        model = pickle.load(file)
    for module in (copy.copy(model[0]), bn_ext.revert(model)[0]):
        print(f"{type(module).__module__}.{type(module).__name__}")
