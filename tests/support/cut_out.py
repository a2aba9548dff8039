"""A masked batch norm by hand: the values that count are cut out, normalized in float64, and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bn_ext import activation as activations


def cut_out(
    input: Tensor,
    mask: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Any = None,
    set_size: int | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Any]]:
    """The output, differentiable, and the statistics: of each set count, mean and variance, and of all of them what the
    running statistics move to. With running statistics they normalize, as in evaluation."""
    rows = []
    sets: list[tuple[Tensor, Tensor, Tensor]] = []
    freedom, squares = 0.0, 0.0
    for images in torch.arange(len(input)).split(set_size or len(input)):
        x, counts = input[images].movedim(1, -1), mask[images] > 0
        values, weights = x[counts], mask[images][counts].to(x.dtype).unsqueeze(-1)
        total = weights.sum()
        mean = (weights * values).sum(0) / total if total > 0 else x.new_zeros(x.shape[-1])
        m2 = (weights * (values - mean).square()).sum(0)
        var = m2 / total if total > 0 else torch.zeros_like(mean)
        sets.append((total, mean, var))
        if len(values) > 1:
            freedom = freedom + (total - weights.square().sum() / total)
            squares = squares + m2
        if running is not None:
            mean, var = running
        z = (values - mean) * (var + eps).rsqrt()
        z = z if weight is None else z * weight
        z = z if bias is None else z + bias
        z = z if residual is None else z + residual[images].movedim(1, -1)[counts]
        out = x.new_zeros(x.shape).masked_scatter(counts.unsqueeze(-1), activations.apply(z, activation, None))
        rows.append(out.movedim(-1, 1))
    counts, means, _ = (torch.stack(column) for column in zip(*sets, strict=True))
    found = {"counts": counts, "mean": means, "var": torch.stack([var for *_, var in sets])}
    if freedom > 0:
        found |= {"moves_to": ((counts.unsqueeze(-1) * means).sum(0) / counts.sum(), squares / freedom)}
    return torch.cat(rows), found


def poisoned(t: Tensor, mask: Tensor) -> Tensor:
    """NaN where the mask is 0."""
    return t.masked_fill(~(mask > 0).unsqueeze(1), torch.nan)
