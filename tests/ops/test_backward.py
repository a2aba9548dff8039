"""Backward against torch and the float64 formulas, on the grid of shapes, layouts, number types and modes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import (
    BFLOAT,
    FLOAT,
    LARGE_GRID,
    LAYOUTS,
    MODES,
    SMALL_GRID,
    TYPES,
    Case,
    Types,
    channels_last,
    contiguous,
    expanded,
    run_ours,
)
from compare import assert_same_sums, check, check_arguments

import bn_ext


@pytest.mark.parametrize("case", SMALL_GRID, ids=str)
def test_small(case: Case, device: str) -> None:
    for mode in MODES:
        check(replace(case, mode=mode), device, backward=True)


@pytest.mark.parametrize("case", LARGE_GRID, ids=str)
def test_large(case: Case, device: str) -> None:
    for mode in (MODES[0], MODES[2]):
        check(replace(case, mode=mode), device, backward=True)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias(layout, types: Types, mode, affine: tuple[bool, bool], device: str) -> None:
    check(Case((3, 19, 5, 7), layout, types, mode, *affine), device, backward=True)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(6, 5), (3, 19, 8), (3, 19, 5, 7), (2, 3, 3, 5, 2)], ids=str)
def test_gradient_of_another_layout(shape: tuple[int, ...], layout, dy_layout, device: str) -> None:
    for mode in MODES:
        check(Case(shape, layout, mode=mode, dy_layout=dy_layout), device, backward=True)


SUBSETS = [subset for subset in itertools.product((False, True), repeat=3) if any(subset)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_subsets_of_the_gradients(wanted, mode, layout, types: Types, device: str) -> None:
    """A result is the same whatever else is asked for."""
    a = Case((5, 19, 6, 7), layout, types, mode).arguments(device)
    every = run_ours(a, backward=True)
    tensors = [t.detach().requires_grad_(w) for t, w in zip((a.input, a.weight, a.bias), wanted, strict=True)]
    running = [None if t is None else t.clone() for t in (a.running_mean, a.running_var)]
    input, weight, bias = tensors
    output = bn_ext.functional.batch_norm(input, *running, weight, bias, a.training, a.momentum, a.eps)
    output.backward(a.dy)
    for name, tensor, want in zip(("dx", "dweight", "dbias"), tensors, wanted, strict=True):
        if want:
            assert_same_sums(tensor.grad, getattr(every, name), name)
        else:
            assert tensor.grad is None, f"{name} was not asked for"


def test_evaluation_gradient_of_the_input_does_not_read_it(device: str) -> None:
    a = Case((4, 5, 6, 6), mode=MODES[2]).arguments(device)
    a.input = torch.full_like(a.input, torch.nan)
    input = a.input.requires_grad_()
    output = bn_ext.functional.batch_norm(input, a.running_mean, a.running_var, a.weight, a.bias)
    (dx,) = torch.autograd.grad(output, input, a.dy)
    assert torch.isfinite(dx).all()


def test_gradient_of_a_sum(device: str) -> None:
    """Its gradient of the output is one number expanded to the whole shape."""
    a = Case((4, 35, 7, 7)).arguments(device)
    a.dy = torch.ones((), device=device).expand(a.input.shape)
    check_arguments(a, True, "sum")


def test_backward_twice_gives_the_same(device: str) -> None:
    a = Case((4, 35, 7, 7), channels_last).arguments(device)
    leaves = [t.requires_grad_() for t in (a.input, a.weight, a.bias)]
    output = bn_ext.functional.batch_norm(a.input, None, None, a.weight, a.bias, training=True)
    first = torch.autograd.grad(output, leaves, a.dy, retain_graph=True)
    second = torch.autograd.grad(output, leaves, a.dy)
    assert all(map(torch.equal, first, second))


def test_expanded_input(device: str) -> None:
    check(Case((6, 5, 4, 4), expanded, dy_layout=channels_last), device, backward=True)
