"""The judge of ``bn_ext.compare`` tells rounding, which may turn branches of activations around, from wrong results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bn_ext.graph.fusion.check import rounded
from bn_ext.tools.judge import Judge, Results
from bn_ext.tools.trial import Call

DY = 1 + torch.rand(64, 4, 16, 16, generator=torch.Generator().manual_seed(1))


class OnKinks(nn.Module):
    """Eight layers with one element each two roundings off the kink of ReLU: in some runs, rounding puts it across."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(8))
        exact = nn.BatchNorm2d(4).double()(x.double()).detach().flatten()
        self.register_buffer("kinks", exact[:: exact.numel() // 8].float() * (1 + 2**-22))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(norm(x) - kink).relu() for norm, kink in zip(self.norms, self.kinks)]).sum(0)


@pytest.fixture(scope="module")
def judge() -> Judge:
    x = torch.randn(DY.shape, generator=torch.Generator().manual_seed(0))
    return Judge(OnKinks(x), Call((x,), {}, lambda y: (y * DY.to(y.dtype)).sum(), None, x.device))


def gradients(results: Results) -> list[str]:
    return [name for name in results if name.startswith("gradient")]


def test_a_branch_that_is_turned_around_in_any_layer_is_explained(judge: Judge) -> None:
    others = [judge._rounded(seed) for seed in range(100, 120)]
    turned = [{n for n in gradients(r) if (r[n] / judge.expected[n] - 1).norm() > 1e-5} for r in others]
    assert len(set.union(*turned)) > len(max(turned, key=len)), "other layers in other runs"
    assert [judge.fault(results) for results in others] == [""] * len(others)


@pytest.mark.parametrize("factor", [-1.0, 0.99, 1.01])
def test_a_wrong_gradient_is_found_beside_branches(judge: Judge, factor: float) -> None:
    for name in gradients(judge.torchs):
        wrong = {**judge.torchs, name: judge.torchs[name] * factor}
        assert judge.fault(wrong).startswith(f"other results: {name} is off by ")


def test_each_seed_rounds_in_other_places() -> None:
    x = torch.randn(1000)
    once, again, other = rounded(x), rounded(x, 0), rounded(x, 1)
    assert torch.equal(once, again) and not torch.equal(once, other)
    torch.testing.assert_close(other, x, rtol=2**-22, atol=0)
