"""Masks, and what a masked batch norm gives by the float64 formulas, set by set."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import KINKS, Arguments
from torch import Tensor

from bn_ext import reference

# Masks by name. Of "second half" the first set may count nothing, of "one value" all sets but one.
MASKS = ["bools", "weights", "second half", "one value", "nothing"]


def mask_of(name: str, x: Tensor) -> Tensor:
    """A mask for ``x`` (N, C, *), of numbers (N, *) of its accumulation type."""
    shape = x.size(0), *x.shape[2:]
    bools = (torch.rand(shape) < 0.6).double()
    place = torch.arange(bools.numel()).view(shape)
    mask = {
        "bools": bools,
        "weights": bools * (torch.rand(shape) + 0.25),
        "second half": bools * (place >= place.numel() // 2),
        "one value": 0.5 * (place == place.numel() * 2 // 3),
        "nothing": torch.zeros(shape),
    }[name]
    return mask.to(torch.promote_types(x.dtype, torch.float32))


def without_others(a: Arguments, mask: Tensor) -> Arguments:
    """The arguments with NaN where the mask is 0."""

    def spoilt(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.masked_fill((mask == 0).unsqueeze(1), torch.nan)

    return replace(a, input=spoilt(a.input), dy=spoilt(a.dy), residual=spoilt(a.residual))


def expected(a: Arguments, mask: Tensor, set_size: int | None = None) -> dict[str, Tensor]:
    """All results by name. In training also the statistics, with a row for each set if there is a set size."""
    size = set_size or a.input.size(0)
    norm = a.running_mean, a.running_var, a.weight, a.bias
    parts: list[dict[str, Tensor]] = []
    for i in range(0, a.input.size(0), size):
        x, dy, residual, m = (None if t is None else t[i : i + size] for t in (a.input, a.dy, a.residual, mask))
        one = reference.results(x, residual, dy, norm, a.training, a.momentum, a.eps, (a.activation, a.param), m)
        mean, var = reference.statistics(x, m)
        parts.append(one | {"mean": mean, "invstd": (var + a.eps).rsqrt()})
    found = {
        name: torch.cat([one[name] for one in parts]) for name in ("output", "dx", "dresidual") if name in parts[0]
    }
    found |= {name: torch.stack([one[name] for one in parts]).sum(0) for name in ("dweight", "dbias")}
    if a.training:
        found |= {name: torch.stack([one[name] for one in parts]) for name in ("mean", "invstd")}
        found |= {} if set_size else {name: found[name][0] for name in ("mean", "invstd")}
    sets = zip(a.input.split(size), mask.split(size), strict=True)
    moves = a.training and sum(reference.freedom(x, m) for x, m in sets) > 0
    running = a.running_mean.double(), a.running_var.double()
    if moves:
        observed = reference.statistics(a.input, mask)[0], reference.pooled_variance(a.input, size, mask)
        running = tuple(reference.running(old, new, a.momentum) for old, new in zip(running, observed, strict=True))
    return found | dict(zip(("running_mean", "running_var"), running, strict=True))


def off_kinks(a: Arguments, mask: Tensor, set_size: int | None = None) -> Arguments:
    """The arguments with a gradient of 0 where rounding could decide on which side of a kink z is."""
    z = expected(replace(a, activation=None), mask, set_size)["output"]
    close = 16 * torch.finfo(a.input.dtype).eps * z.abs().amax()
    near = [(z - kink).abs() < close for kink in KINKS.get(a.activation or "", ())]
    return replace(a, dy=a.dy.masked_fill(torch.stack(near).any(0), 0)) if near else a


def assert_close(found: dict[str, Tensor | None], exact: dict[str, Tensor], mask: Tensor) -> None:
    """Up to some units in the last place of the largest value of a channel; and 0 where the mask is."""
    for name, value in exact.items():
        ours = found[name]
        eps = 4 * torch.finfo(ours.dtype).eps if ours.dtype != torch.float64 else 1e-7
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(
            ours.double(), value, rtol=eps, atol=eps * scale, msg=lambda m, name=name: f"{name}: {m}"
        )
        if name in ("output", "dx", "dresidual"):
            assert not ours.movedim(1, -1)[mask == 0].any(), f"{name} where the mask is 0"
