"""Mistakes in masks and lengths: what is asked and what was given, with and without data, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import bn_ext

BN = bn_ext.nn.GhostBatchNorm1d
CALLS: dict[str, Callable[..., Any]] = {
    "module": lambda bn, x, mask: bn(x, mask=mask),
    "noise": lambda bn, x, mask: bn(x, mask=mask),
    "function": lambda bn, x, mask: bn_ext.functional.batch_norm(
        x, bn.running_mean, bn.running_var, training=True, mask=mask
    ),
    "stages": lambda bn, x, mask: bn_ext.stages.stats(x, mask=mask),
}
MISTAKES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "sizes": (lambda m: m[:, :-1], ValueError, r"expected a mask of sizes \(N, \*\) .* \[4, 3, 6\], got \[4, 5\]"),
    "dimensions": (lambda m: m.unsqueeze(1), ValueError, r"expected a mask of sizes \(N, \*\) .*, got \[4, 1, 6\]"),
    "type": (
        lambda m: m.to(torch.complex64),
        RuntimeError,
        "mask of type Bool or of real numbers, got Strided of type ComplexFloat",
    ),
    "layout": (lambda m: m.float().to_sparse(), RuntimeError, "expected a strided mask .* got Sparse of type Float"),
    "gradient": (lambda m: m.float().requires_grad_(), RuntimeError, "mask cannot require gradients"),
    "place": (lambda m: m.to("meta"), RuntimeError, "mask is on meta but input is on"),
    "list": (lambda m: [1.0] * 6, TypeError, "^batch_norm.*: argument 'mask' must be Tensor, not list$"),
    "array": (
        lambda m: torch.ones(4, 6).numpy(),
        TypeError,
        "^batch_norm.*: argument 'mask' must be Tensor, not ndarr",
    ),
}


def rejected(call: Callable[[], Any], bn: nn.Module, error: type[Exception], message: str) -> None:
    """Raises this, and neither statistics nor the generator of random numbers move."""
    before, state = copy.deepcopy(bn.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=message):
        call()
    assert all(map(torch.equal, bn.state_dict().values(), before.values()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("wrong", MISTAKES)
def test_masks(wrong: str, call: str, device: str) -> None:
    change, error, message = MISTAKES[wrong]
    bn, x = BN(3, 2, noise=call == "noise").to(device), torch.randn(4, 3, 6, device=device)
    mask = change(torch.ones(4, 6, dtype=torch.bool, device=device))
    rejected(lambda: CALLS[call](bn, x, mask), bn, error, message)
    if wrong != "layout":  # there are no fake sparse tensors
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(error, match=message):
            CALLS[call](BN(3, 2), torch.empty(4, 3, 6), fake.from_tensor(mask) if isinstance(mask, Tensor) else mask)


LENGTHS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "sizes": (lambda t: t[:3], ValueError, r"lengths of sizes .*\[3\].* are for inputs \(N, C, L\), got .*\[4, 3, 6\]"),
    "dimensions": (lambda t: t.unsqueeze(1), ValueError, r"lengths of sizes .*\[4, 1\].* are for inputs"),
    "fractions": (lambda t: t / 6, TypeError, "lengths should be of an integer type, got torch.float32"),
    "bool": (lambda t: t > 2, TypeError, "lengths should be of an integer type, got torch.bool"),
    "place": (lambda t: t.to("meta"), RuntimeError, "lengths is on meta but input is on"),
    "list": (lambda t: t.tolist(), TypeError, "argument 'lengths' must be Tensor, not list"),
}


@pytest.mark.parametrize("wrong", LENGTHS)
def test_lengths(wrong: str, device: str) -> None:
    change, error, message = LENGTHS[wrong]
    bn, x = bn_ext.BatchNorm1d(3).to(device), torch.randn(4, 3, 6, device=device)
    lengths = change(torch.tensor([1, 2, 3, 4], device=device))
    rejected(lambda: bn(x, lengths=lengths), bn, error, message)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(error, match=message):
        bn(torch.empty(4, 3, 6), lengths=fake.from_tensor(lengths) if isinstance(lengths, Tensor) else lengths)


def test_mask_and_lengths(device: str) -> None:
    bn, x = bn_ext.BatchNorm1d(3).to(device), torch.randn(4, 3, 6, device=device)
    mask, lengths = torch.ones(4, 6, device=device), torch.tensor([1, 2, 3, 4], device=device)
    rejected(lambda: bn(x, mask=mask, lengths=lengths), bn, ValueError, "mask and lengths were both given")
    rejected(lambda: bn(x[..., 0], lengths=lengths), bn, ValueError, r"are for inputs \(N, C, L\), got .*\[4, 3\]")


def test_running_statistics_captured_by_vmap(device: str) -> None:
    """Says that it is the mask by which they would be written to."""
    bn, mask = bn_ext.BatchNorm1d(3).to(device), torch.ones(4, 6, device=device)
    many = torch.randn(2, 4, 3, 6, device=device)
    message = "under torch.func, with a mask, running_mean and running_var should be tensors that"
    rejected(lambda: torch.func.vmap(lambda x: bn(x, mask=mask))(many), bn, RuntimeError, message)


def test_classes_that_take_no_mask() -> None:
    x, mask = torch.randn(4, 4, 6), torch.ones(4, 6, dtype=torch.bool)
    for bn in (bn_ext.nn.SharedBatchNorm1d(4, 2), bn_ext.BatchNormAct1d(4), bn_ext.nn.BatchNormLast(6)):
        for training in (True, False):
            with pytest.raises(TypeError, match="mask"):
                bn.train(training)(x, mask=mask)
    adapted = bn_ext.BatchNorm1d(4).eval()
    bn_ext.train.adapt(adapted, 0.5)
    with pytest.raises(TypeError, match="takes no mask"):
        adapted(x, mask=mask)
