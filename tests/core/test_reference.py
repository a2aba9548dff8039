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
