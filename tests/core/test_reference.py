"""The float64 formulas of the activations against torch's operators, their derivatives against autograd."""

from __future__ import annotations

import pytest
import torch

from bn_ext import activation as activations
from bn_ext import reference


@pytest.mark.parametrize("param", [0.01, 0.3])
@pytest.mark.parametrize("name", activations.NAMES)
def test_activations_are_exact_in_float64(name: str, param: float) -> None:
    """On both sides of every kink. Autograd goes through our formula: torch's hardsigmoid has a float32 sixth."""
    z = torch.linspace(-20, 20, 4000, dtype=torch.float64, requires_grad=True)
    value = reference.activated(z, name, param)
    (derivative,) = torch.autograd.grad(value.sum(), z)
    z, value = z.detach(), value.detach()
    given = param if activations.DEFAULTS[name] is not None else None
    torch.testing.assert_close(value, activations.apply(z, name, given), rtol=1e-13, atol=1e-15)
    found = reference.behind(torch.ones_like(z), z, name, param)
    assert found.dtype == value.dtype == torch.float64
    torch.testing.assert_close(found, derivative, rtol=1e-13, atol=1e-15)


MASKS = {
    "bools": torch.tensor([[True, False, True], [False, True, True]]),
    "weights": torch.tensor([[0.5, 0.0, 2.0], [0.0, 1.0, 3.5]]),
    "one value": torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]),
    "none": torch.zeros(2, 3),
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_weighs_values_and_cuts_others_out(mask: torch.Tensor, activation: str | None) -> None:
    """As torch's var_mean of the values that count, each so many times as it counts in halves; the gradients by
    autograd; what does not count is NaN."""
    torch.manual_seed(0)
    counts = mask > 0
    x, residual, dy = (torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(3))
    for t in (x, residual, dy):
        t.movedim(1, -1)[~counts] = torch.nan
    norm = torch.zeros(4).double(), torch.ones(4).double(), torch.randn(4).double(), torch.randn(4).double()
    mean, var = reference.statistics(x, mask)
    rows, halves = x.movedim(1, -1)[counts], mask[counts].double()
    several = rows.repeat_interleave((2 * halves).long(), 0) if len(rows) > 0 else torch.zeros(1, 4).double()
    expected_var, expected_mean = torch.var_mean(several, 0, correction=0)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(var, expected_var, rtol=1e-13, atol=1e-15)

    found = reference.results(x, residual, dy, norm, True, 0.25, 1e-5, (activation, 0.0), mask)
    free = halves.sum() - halves.square().sum() / halves.sum() if len(rows) > 1 else 0
    moved = (mean / 4, 0.75 + var * halves.sum() / free / 4) if free > 0 else norm[:2]
    torch.testing.assert_close((found["running_mean"], found["running_var"]), moved)

    leaves = [t.clone().requires_grad_() for t in (rows, norm[2], norm[3], residual.movedim(1, -1)[counts])]
    own, weight, bias, added = leaves
    share = (halves / halves.sum()).unsqueeze(1)
    own_mean = (own * share).sum(0)
    invstd = (((own - own_mean).square() * share).sum(0) + 1e-5).rsqrt()
    y = activations.apply((own - own_mean) * invstd * weight + bias + added, activation, None)
    gradients = torch.autograd.grad(y, leaves, dy.movedim(1, -1)[counts])
    parts = "output", "dx", "dweight", "dbias", "dresidual"
    for part, value in zip(parts, (y.detach(), *gradients), strict=True):
        ours = found[part] if value.dim() == 1 else found[part].movedim(1, -1)[counts]
        torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-12, msg=lambda m, part=part: f"{part}: {m}")
        assert value.dim() == 1 or not found[part].movedim(1, -1)[~counts].any(), part
