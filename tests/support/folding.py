"""Models to fold, and what the folded ones have to agree in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bn_ext.graph import folds


class Custom(nn.Module):
    """conv and norm, called as told."""

    def __init__(self, call: Callable[..., Any], norm: nn.Module | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), norm or nn.BatchNorm2d(6)
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def trained(model: nn.Module) -> nn.Module:
    """In evaluation mode, with random parameters and statistics in its batch norms."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            tensors = dict(module.named_buffers(recurse=False)) | dict(module.named_parameters(recurse=False))
            for name, tensor in tensors.items():
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 2) if name == "running_var" else nn.init.normal_(tensor)
    return model.eval()


def pair(layer: nn.Module, norm: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> nn.Module:
    return trained(nn.Sequential(layer, norm(6, **options)))


def assert_same_outputs(
    folded: Callable[..., Any], model: Callable[..., Any], *args: Any, tolerance: float = 1e-12, **kwargs: Any
) -> None:
    ones, others = (tree_leaves(m(*copy.deepcopy(args), **kwargs)) for m in (folded, model))
    for one, other in zip(ones, others, strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())
        else:
            assert one == other


def outcomes(folded: Any) -> dict[str, str]:
    return {fold.batch_norm: fold.into for fold in folds(folded)}


def batch_norms(model: nn.Module) -> int:
    return sum("running_mean" in module._buffers for module in model.modules())


def image(**options: Any) -> Tensor:
    return torch.randn(2, 6, 5, 5, **options)
