"""Residual and activation in the same call: every activation, alone and behind a residual, in every mode, layout and
number type, against torch's separate operators and the float64 formulas."""

from __future__ import annotations

import itertools
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    LAYOUTS,
    MODES,
    STRAIGHT,
    TYPES,
    Case,
    Types,
    channels_last,
    contiguous,
    run_ours,
    run_torch,
    transposed,
    unaligned,
)
from compare import assert_same_sums, check
from torch import Tensor

import bn_ext
from bn_ext.activation import DEFAULTS, NAMES, PARAMETERS
from bn_ext.functional import batch_norm

OPS = torch.ops.bn_ext
ROOT = Path(__file__).parents[2]
check = partial(check, slack=2.0)  # of thousands of cases some are off by chance
# Rows of whole bytes of branch bits, that end or begin within one; planes that are joined and that are not.
SHAPES = [(33, 65), (3, 1, 7, 7), (8, 64, 1, 1), (3, 65, 49), (2, 16, 33, 32), (9, 24, 14, 14), (2, 3, 3, 5, 2)]
# Rows, runs of planes and branch bits that end with a byte, or with a word, or not.
BRANCHED = [(2, 16, 33, 32), (3, 64, 7, 7), (3, 65, 7, 7), (32, 65, 7, 7), (3, 8, 1, 5), (2, 24, 1, 4), (5, 3)]
LARGE = [(5003, 7), (4, 2, 70001), (16, 33, 14, 14), (32, 64, 32, 32)]


@contextmanager
def filled_memory() -> Iterator[None]:
    """New tensors are of all ones."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, dtype=torch.uint8) == 255
        yield
    finally:
        torch.use_deterministic_algorithms(False)


every_activation = pytest.mark.parametrize("activation", NAMES)
with_and_without_residual = pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])


@every_activation
@with_and_without_residual
def test_types(activation: str, residual: bool, device: str) -> None:
    for layout, types, mode in itertools.product((contiguous, channels_last), TYPES, MODES):
        check(Case((5, 19, 6, 7), layout, types, mode, residual=residual, activation=activation), device, True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu"])
@with_and_without_residual
def test_shapes(shape, activation: str, residual: bool, device: str) -> None:
    for layout, types, mode in itertools.product((contiguous, channels_last), (FLOAT, DOUBLE, BFLOAT), MODES):
        check(Case(shape, layout, types, mode, residual=residual, activation=activation), device, True)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@with_and_without_residual
def test_large(shape, layout, activation: str, residual: bool, device: str) -> None:
    for types in (FLOAT, BFLOAT):
        check(Case(shape, layout, types, residual=residual, activation=activation), device, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_residual_of_another_layout(layout, residual_layout, activation: str, device: str) -> None:
    case = Case((3, 19, 5, 7), layout, residual=True, residual_layout=residual_layout, activation=activation)
    check(case, device, backward=layout is not LAYOUTS[-1])


@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@with_and_without_residual
def test_without_weight_or_bias(affine, activation: str, residual: bool, device: str) -> None:
    for mode in MODES:
        case = Case((3, 19, 5, 7), channels_last, FLOAT, mode, *affine, residual=residual, activation=activation)
        check(case, device, backward=True)


@pytest.mark.parametrize("activation", PARAMETERS)
@pytest.mark.parametrize("param", [0.0, 0.3, 1.7, -0.5])
@with_and_without_residual
def test_parameter(activation: str, param: float, residual: bool, device: str) -> None:
    if (activation, param) == ("celu", 0.0):  # a division by zero, in torch too
        with pytest.raises(ValueError, match="activation_param of celu should not be 0"):
            run_ours(Case((3, 5), activation=activation, activation_param=param).arguments(device))
        return
    case = Case((3, 19, 5, 7), residual=residual, activation=activation, activation_param=param)
    check(case, device, backward=True)


SUBSETS = [subset for subset in itertools.product((False, True), repeat=4) if any(subset)]


@pytest.mark.parametrize("wanted", SUBSETS, ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_subsets_of_the_gradients(wanted, activation: str, layout, device: str) -> None:
    """A result is the same whatever else is asked for."""
    for mode, types in itertools.product(MODES, (FLOAT, BFLOAT)):
        a = Case((5, 19, 6, 7), layout, types, mode, residual=True, activation=activation).arguments(device)
        every = run_ours(a, backward=True)
        leaves = (a.input, a.weight, a.bias, a.residual)
        input, weight, bias, residual = (t.detach().requires_grad_(w) for t, w in zip(leaves, wanted, strict=True))
        running = [None if t is None else t.clone() for t in (a.running_mean, a.running_var)]
        rest = a.training, a.momentum, a.eps, residual, a.activation
        batch_norm(input, *running, weight, bias, *rest).backward(a.dy)
        for name, leaf, want in zip(every._fields[3:], (input, weight, bias, residual), wanted, strict=True):
            if want:
                assert_same_sums(leaf.grad, getattr(every, name), name)
            else:
                assert leaf.grad is None, f"{name} was not asked for"


# ---------------------------------------------------------------------------------------------- kinks, NaN, infinity


def at_values(values: Tensor, activation: str, residual: bool, ours: bool, param: float | None) -> tuple[Tensor, ...]:
    """Output and gradient of z where z takes exactly these values: of the input, or of the residual alone."""
    input = torch.zeros(len(values), 3).copy_(values[:, None]).requires_grad_()
    added = input if residual else None
    mean, var, eps = torch.zeros(3), torch.ones(3), 0.0
    input_of_norm = torch.zeros_like(input) if residual else input
    if ours:
        output = batch_norm(
            input_of_norm, mean, var, eps=eps, residual=added, activation=activation, activation_param=param
        )
    else:
        output = bn_ext.activation.apply(input + 0, activation, param)
    return output.detach(), torch.autograd.grad(output, input, torch.full_like(output, 2))[0]


@every_activation
@with_and_without_residual
def test_gradient_at_kinks_and_beyond_numbers(activation: str, residual: bool) -> None:
    """torch's, at every value where a formula changes, at infinity and for NaN; where torch's vectors give one thing
    and what is left at their end another, either of them."""
    param = None if DEFAULTS[activation] is None else 0.3
    # torch's own values or gradients at infinity are NaN for these three
    infinite = [] if activation in ("gelu", "gelu_tanh", "mish") else [torch.inf, -torch.inf]
    for value in (-6.0, -3.0, -0.0, 0.0, 3.0, 6.0, 1e-30, -1e-30, 5e-45, -5e-45, torch.nan, *infinite):
        values = torch.full((17,), value)
        ours, torchs = (at_values(values, activation, residual, side, param) for side in (True, False))
        for mine, theirs in zip(ours, torchs, strict=True):
            either = [torch.isclose(mine, t, rtol=1e-6, atol=5e-7, equal_nan=True) for t in theirs.flatten()[[0, -1]]]
            assert (either[0] | either[1]).all(), f"at {value}: {mine[0, 0]}, torch's {theirs[0, 0]}"


@every_activation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_large_values_have_values_and_two_derivatives(activation: str, dtype: torch.dtype, device: str) -> None:
    """No NaN, and the limits, wherever an exponential, a square or a cube overflows. In evaluation z is the input."""
    sizes = [7, 9.5, 10.5, 12, 21, 23, 40, 60, 89, 104, 300, 800, 3e4, 1e13, 1e20, 1e30]
    values = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=torch.float64)
    z = values[values.abs() <= torch.finfo(dtype).max].to(dtype).repeat_interleave(3).view(-1, 3).to(device)
    z.requires_grad_()
    param = DEFAULTS[activation]
    output = batch_norm(z, z.new_zeros(3), z.new_ones(3), eps=0.0, activation=activation)
    value, slope = (f(z.detach().cpu().double(), param or 0.0) for f in bn_ext.reference.ACTIVATIONS[activation])
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps, "check_dtype": False}
    torch.testing.assert_close(output.detach().cpu(), value.to(dtype), **tolerance)
    (gradient,) = torch.autograd.grad(output, z, torch.ones_like(z), retain_graph=True)
    torch.testing.assert_close(gradient.cpu(), slope.to(dtype), **tolerance)
    (gradient,) = torch.autograd.grad(output, z, torch.ones_like(z), create_graph=True)
    if gradient.requires_grad:
        (second,) = torch.autograd.grad(gradient, z, torch.ones_like(z))
        assert torch.isfinite(second).all()


@pytest.mark.parametrize("layout", [contiguous, channels_last, unaligned])
@pytest.mark.parametrize("types", [FLOAT, BFLOAT, DOUBLE], ids=str)
@with_and_without_residual
def test_gradient_is_that_of_the_output(layout, types: Types, residual: bool, device: str) -> None:
    """Where relu let nothing through, no gradient comes back; elsewhere all of it: z is the same number both ways."""
    mode = MODES[2]
    a = Case((9, 37, 15, 14), layout, types, mode, residual=residual, activation="relu").arguments(device)
    a.dy, a.weight = torch.ones_like(a.dy), a.weight.abs() + 0.5
    r = run_ours(a, backward=True)
    passed = r.output > 0
    assert torch.equal(r.dx != 0, passed)
    if residual:
        assert torch.equal(r.dresidual, passed.to(a.dy.dtype))


BRANCH = {
    "relu": lambda y: y <= 0,
    "relu6": lambda y: (y <= 0) | (y >= 6),
    "leaky_relu": lambda y: y > 0,
    "hardsigmoid": lambda y: (y > 0) & (y < 1),
}


@pytest.mark.parametrize("activation", STRAIGHT)
@pytest.mark.parametrize("shape", BRANCHED, ids=str)
def test_branches(activation: str, shape, device: str) -> None:
    """A bit an element in the order of memory, and none beyond them, whatever was there before. All else is the same
    without branches."""
    layouts, modes = (contiguous, channels_last), (MODES[0], MODES[2])
    for layout, types, mode, residual in itertools.product(layouts, (DOUBLE, FLOAT), modes, (False, True)):
        case = Case(shape, layout, types, mode, residual=residual, activation=activation)
        a = case.arguments(device)
        behind = a.eps, a.residual, NAMES.index(activation), a.param
        if mode.training:
            call = partial(OPS.batch_norm_forward, a.input, a.weight, a.bias, None, None, None, 0.1, *behind, None)
        else:
            running = a.running_mean, a.running_var
            call = partial(OPS.batch_norm_forward.evaluation, a.input, a.weight, a.bias, *running, *behind)
        with filled_memory():
            output, *statistics, branches = call(True)
        for one, other in zip((output, *statistics), call(False)[:3], strict=True):
            assert torch.equal(one, other), case
        assert branches.numel() == (a.input.numel() + 31) // 32 * 4
        bits = (branches[:, None] >> torch.arange(8, device=device) & 1).bool().flatten()
        stored = output if output.is_contiguous() else output.movedim(1, -1)
        assert torch.equal(bits[: output.numel()], BRANCH[activation](stored.flatten())), case
        assert not bits[output.numel() :].any(), case


def test_large_values_that_overflow_a_sum(device: str) -> None:
    a = Case((64, 5, 8, 8), residual=True, activation="relu").arguments(device)
    a.dy = a.dy * 1e37
    ours, torchs = run_ours(a, backward=True), run_torch(replace(a, dy=a.dy), backward=True)
    torch.testing.assert_close(ours.dresidual, torchs.dresidual)
    assert torch.isfinite(ours.dbias).all() == torch.isfinite(torchs.dbias).all()


# ---------------------------------------------------------------------------------------------- derivatives


@every_activation
@with_and_without_residual
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed])
def test_first_and_second_derivatives(activation: str, residual: bool, training: bool, layout, device: str) -> None:
    case = Case((3, 2, 2, 3), layout, DOUBLE, MODES[0 if training else 2], residual=residual, activation=activation)
    a = case.arguments(device)
    leaves = [t.detach().requires_grad_() for t in (a.input, a.weight, a.bias, a.residual) if t is not None]

    def call(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        running = [t.clone() for t in (a.running_mean, a.running_var)]
        rest = a.training, a.momentum, 0.1, residual, activation
        return batch_norm(input, *running, weight, bias, *rest)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    output = call(*leaves)
    plain = torch.autograd.grad(output, leaves, a.dy, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, leaves, a.dy, create_graph=True), plain)


# ---------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("activation", ["relu", "silu", None])
@pytest.mark.parametrize("change", [lambda r: r[:, :, :1], lambda r: r[0], lambda r: r.double()], ids=["1", "2", "3"])
def test_residual_that_torch_would_broadcast_or_promote(activation, change, device: str) -> None:
    a = Case((3, 4, 5, 6), residual=True).arguments(device)
    residual = change(a.residual).requires_grad_()
    input = a.input.requires_grad_()
    mine = batch_norm(input, None, None, a.weight, a.bias, True, residual=residual, activation=activation)
    normalized = torch.nn.functional.batch_norm(input, None, None, a.weight, a.bias, True)
    theirs = bn_ext.activation.apply(normalized + residual, activation, None)
    as_float = {"rtol": 1.3e-6, "atol": 1e-5}  # the normalized values are that, whatever the residual is
    torch.testing.assert_close(mine, theirs, **as_float)
    dy = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, (input, residual), dy) for y in (mine, theirs)), **as_float)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda x: x[:, :2], r"residual of sizes \[4, 2, 5, 5\] for an input of sizes .* must match the size"),
        (lambda x: x.to("meta"), "residual is on meta but input is on"),
        (lambda x: x.to(torch.complex64), "residual is of type ComplexFloat"),
    ],
    ids=["sizes", "device", "type"],
)
def test_rejected_residual_changes_nothing(wrong, error: str, device: str) -> None:
    module = bn_ext.BatchNormAct2d(3, device=device, activation="silu")
    x = torch.randn(4, 3, 5, 5, device=device)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=error):
        module(x, wrong(x))
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_number_for_a_residual(device: str) -> None:
    module = bn_ext.BatchNormAct2d(3, device=device, activation="relu").eval()
    x = torch.randn(2, 3, 4, 4, device=device)
    torch.testing.assert_close(module(x, 2), module(x, torch.full_like(x, 2)))


def test_residual_that_is_the_input(device: str) -> None:
    a = Case((4, 5, 6, 6), types=DOUBLE, activation="relu").arguments(device)
    x = a.input.requires_grad_()
    mine = batch_norm(x, None, None, a.weight, a.bias, True, residual=x, activation="relu")
    theirs = torch.relu(torch.nn.functional.batch_norm(x, None, None, a.weight, a.bias, True) + x)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, a.dy) for y in (mine, theirs)))


def test_mistakes(device: str) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    with pytest.raises(
        ValueError, match=r"activation should be None or one of identity, relu, .*gelu_tanh, got 'selu'"
    ):
        batch_norm(x, mean, var, training=True, activation="selu")
    with pytest.raises(
        ValueError, match=r"activation_param is for leaky_relu, elu, celu, got 0.1 with activation='relu'"
    ):
        batch_norm(x, mean, var, training=True, activation="relu", activation_param=0.1)
    with pytest.raises(ValueError, match=r"got 'Relu'; did you mean 'relu'\?"):
        bn_ext.BatchNorm2d(3, device=device)(x, activation="Relu")
    with pytest.raises(RuntimeError, match="size of tensor a"):
        batch_norm(x, mean, var, training=False, residual=x[:, :, :3])
    for options, message in ((("swish", None), "got 'swish'"), (("gelu", 1.0), "got 1.0 with activation='gelu'")):
        with pytest.raises(ValueError, match=message):
            bn_ext.BatchNormAct2d(3, activation=options[0], activation_param=options[1])
    assert torch.equal(mean, torch.zeros_like(mean)), "a rejected call changes nothing"


def test_names_and_parameters() -> None:
    assert get_args(bn_ext.activation.Names) == NAMES
    assert tuple(bn_ext.reference.ACTIVATIONS) == NAMES
    assert {name for name, param in DEFAULTS.items() if param is not None} == set(PARAMETERS)
    assert PARAMETERS == {"leaky_relu": "negative_slope", "elu": "alpha", "celu": "alpha"}
    assert (DEFAULTS["leaky_relu"], DEFAULTS["elu"], DEFAULTS["celu"]) == (0.01, 1.0, 1.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("forgets", [False, True])
def test_a_switch_that_forgets_an_activation_is_an_error(forgets: bool) -> None:
    table = (ROOT / "csrc/core/activation.h").read_text()
    kinds = re.findall(r"^  (?:PLAIN|PARAMETRIC)\((\w+), ", table, re.MULTILINE)
    assert len(kinds) == len(NAMES)
    cases = " ".join(f"case bn::ActivationKind::{kind}:" for kind in kinds[forgets:])
    source = (
        f'#include "core/activation.h"\nint f(bn::ActivationKind k) {{ switch (k) {{ {cases} return 1; }} return 0; }}'
    )
    command = [
        "g++",
        *runpy.run_path(str(ROOT / "setup.py"))["FLAGS"],
        f"-I{ROOT / 'csrc'}",
        "-fsyntax-only",
        "-x",
        "c++",
        "-",
    ]
    run = subprocess.run(command, input=source, text=True, capture_output=True, check=False)
    assert (run.returncode != 0) == forgets, run.stderr
    assert ("-Werror=switch" in run.stderr) == forgets


def test_no_switch_over_activations_has_a_default() -> None:
    for path in (ROOT / "csrc").glob("**/*.[hc]*"):
        for body in re.findall(r"switch \(\w+\.kind\) \{(.*?)\n  \}\n", path.read_text(), re.DOTALL):
            assert "default:" not in body, path


def test_module(device: str) -> None:
    module = bn_ext.BatchNormAct2d(3, device=device, activation="leaky_relu", activation_param=0.2)
    assert repr(module).endswith("activation=leaky_relu, activation_param=0.2, bn_ext)")
    x, r = torch.randn(2, 2, 3, 4, 4, device=device)
    expected = torch.nn.functional.leaky_relu(torch.nn.BatchNorm2d(3, device=device)(x) + r, 0.2)
    torch.testing.assert_close(module(x, r), expected)
    scripted = torch.jit.script(module.eval())
    assert torch.equal(scripted(x, r), module(x, r))
    assert torch.equal(scripted(x), module(x))
