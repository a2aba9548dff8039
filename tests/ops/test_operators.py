"""The registered operators themselves: schemas, opcheck, what each returns, meta and fake tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    MODES,
    STRAIGHT,
    Case,
    Mode,
    channels_last,
    contiguous,
    same_format,
    strided,
    transposed,
    unaligned,
)
from compare import assert_same_sums
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import bn_ext
from bn_ext import reference
from bn_ext.activation import DEFAULTS, NAMES

OPS = torch.ops.bn_ext
MUTABLE = "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked"
NORM = f"Tensor input, Tensor? weight, Tensor? bias, {MUTABLE}"
FUSED = "Tensor? residual, int activation, float activation_param"
OF_SETS = "int? set_size"
READ = "Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd"
BEHIND = "Tensor? residual, Tensor? branches, int activation, float activation_param"
MASK = "Tensor? mask=None"
SCHEMAS = {
    "batch_norm": f"({NORM}, bool training, float? momentum, float eps, Tensor? residual=None, str? activation=None, "
    f"float? activation_param=None, int? set_size=None, {MASK}) -> Tensor",
    "batch_norm_mask": "(Tensor input, Tensor mask, bool relative=False) -> Tensor",
    "batch_norm_forward": f"({NORM}, float? momentum, float eps, {FUSED}, {OF_SETS}, bool with_branches, {MASK}) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor branches)",
    "batch_norm_forward.evaluation": "(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, "
    f"Tensor running_var, float eps, {FUSED}, bool with_branches, {MASK}) "
    "-> (Tensor output, Tensor mean, Tensor invstd, Tensor branches)",
    "batch_norm_backward": f"(Tensor dy, Tensor? input, {READ}, bool training, {BEHIND}, {OF_SETS}, "
    f"bool[4] output_mask, {MASK}) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    "batch_norm_stats": f"(Tensor input, {OF_SETS}=None, {MASK}) -> (Tensor count, Tensor mean, Tensor m2)",
    "batch_norm_merge_stats": f"(Tensor count, Tensor mean, Tensor m2, {MUTABLE}, float? momentum, float eps) "
    "-> (Tensor count, Tensor mean, Tensor invstd)",
    "batch_norm_elemt": f"(Tensor input, {READ}, {FUSED}, {OF_SETS}, bool with_branches, {MASK}) "
    "-> (Tensor output, Tensor branches)",
    "batch_norm_backward_reduce": f"(Tensor dy, Tensor input, {READ}, {BEHIND}, {OF_SETS}, {MASK}) "
    "-> (Tensor sum_dz, Tensor sum_dz_xmu)",
    "batch_norm_backward_elemt": f"(Tensor dy, Tensor input, {READ}, Tensor sum_dz, Tensor sum_dz_xmu, Tensor count, "
    f"{BEHIND}, {OF_SETS}, bool[2] output_mask, {MASK}) -> (Tensor dx, Tensor dresidual)",
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    op = attrgetter(name if "." in name else f"{name}.default")(OPS)
    assert str(op._schema) == f"bn_ext::{name}{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in op.tags


def arguments_of(case: Case, device: str, gradients: bool = False, momentum: float | None = 0.1) -> tuple:
    """The arguments of batch_norm."""
    a = case.arguments(device)
    counter = torch.tensor(3, device=device) if case.mode.running else None
    input, weight, bias, residual = (
        None if t is None else t.requires_grad_(gradients) for t in (a.input, a.weight, a.bias, a.residual)
    )
    norm = input, weight, bias, a.running_mean, a.running_var, counter, a.training, momentum, a.eps
    return *norm, residual, a.activation, a.activation_param


def numbered(case: Case) -> tuple[int, float]:
    """The activation as the operators below batch_norm take it."""
    name = case.activation or "identity"
    param = case.activation_param
    return NAMES.index(name), (DEFAULTS[name] or 0.0) if param is None else param


def forward_call(case: Case, device: str) -> tuple[OpOverload, tuple]:
    """The operator of the forward below autograd, in training or evaluation, and its arguments."""
    arguments = *arguments_of(case, device)[:-2], *numbered(case)
    if case.mode.training:
        return OPS.batch_norm_forward.default, (*arguments[:6], *arguments[7:], None, has_branch_bits(case))
    return OPS.batch_norm_forward.evaluation, (*arguments[:5], *arguments[8:], has_branch_bits(case))


def backward_arguments(case: Case, device: str, output_mask: tuple[bool, ...] = (True,) * 4) -> tuple:
    a = case.arguments(device)
    forward, arguments = forward_call(case, device)
    _, mean, invstd, mask = forward(*arguments)
    kept = (None, mask) if has_branch_bits(case) else (a.residual, None)
    fused = *kept, *numbered(case), None
    return a.dy, a.input, a.weight, a.bias, mean, invstd, a.training, *fused, list(output_mask)


def has_branch_bits(case: Case) -> bool:
    return case.residual and case.activation in STRAIGHT


TRAINING, BATCH, EVALUATION = MODES
CASES = [
    Case((5, 3)),
    Case((5, 3), strided, BFLOAT, EVALUATION),
    Case((3, 4, 5), channels_last, BFLOAT, TRAINING, bias=False),
    Case((3, 4, 5), mode=EVALUATION, weight=False),
    Case((3, 4, 2, 3), contiguous, BFLOAT, BATCH),
    Case((3, 4, 2, 3), channels_last, FLOAT, TRAINING),
    Case((3, 4, 2, 3), channels_last, FLOAT, BATCH, weight=False, bias=False),
    Case((3, 4, 2, 3), strided, FLOAT, TRAINING, weight=False),
    Case((3, 4, 2, 3), transposed, FLOAT, EVALUATION),
    Case((2, 4, 2, 3, 2), channels_last, BFLOAT, EVALUATION, weight=False, bias=False),
    Case((2, 4, 2, 3, 2), unaligned, FLOAT, TRAINING),
    Case((3, 4, 2, 3), activation="silu"),
    Case((3, 4, 2, 3), channels_last, BFLOAT, residual=True, activation="relu"),
    Case((3, 4, 5), mode=EVALUATION, residual=True, activation="leaky_relu", activation_param=0.2),
    Case((3, 4, 2, 3), residual=True, activation="gelu", residual_layout=channels_last),
    Case((5, 3), residual=True),
]


def named(p: Case) -> str:
    return f"{p}-{p.mode}" + "-weight" * p.weight + "-bias" * p.bias


@pytest.mark.parametrize("case", CASES, ids=named)
@pytest.mark.parametrize("gradients", [True, False])
def test_opcheck_batch_norm(case: Case, gradients: bool, device: str) -> None:
    torch.library.opcheck(OPS.batch_norm.default, arguments_of(case, device, gradients))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_opcheck_lower_operators(case: Case, device: str) -> None:
    torch.library.opcheck(*forward_call(case, device))
    mask = (True, case.weight, case.bias, case.residual)
    torch.library.opcheck(OPS.batch_norm_backward.default, backward_arguments(case, device, mask))


@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_opcheck_backward_without_input(layout, activation: str, device: str) -> None:
    case = Case((3, 4, 2, 3), layout, FLOAT, EVALUATION, activation=activation)
    forward, arguments = forward_call(case, device)
    _, mean, invstd, mask = forward(*arguments[:-1], activation == "relu")
    a = case.arguments(device)
    behind = None, mask, *numbered(case), None, [True, False, True, False]
    torch.library.opcheck(OPS.batch_norm_backward.default, (a.dy, None, a.weight, a.bias, mean, invstd, False, *behind))


def test_opcheck_cumulative_average(device: str) -> None:
    torch.library.opcheck(OPS.batch_norm.default, arguments_of(CASES[0], device, True, momentum=None))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("offset", [2.0, 1e6])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_statistics(mode: Mode, layout, offset: float, device: str) -> None:
    """The batch's statistics, to float32's precision of the deviation, whatever the mean; the running ones exactly."""
    case = Case((5, 19, 33, 7), layout, mode=mode, offset=offset)
    forward, arguments = forward_call(case, device)
    input, _, _, running_mean, running_var, *_ = arguments
    _, mean, invstd, _ = forward(*(t.clone() if isinstance(t, Tensor) else t for t in arguments))
    assert mean.dtype == invstd.dtype == torch.float64
    assert mean.shape == invstd.shape == (19,)
    if not mode.training:
        assert torch.equal(mean, running_mean.double())
        torch.testing.assert_close(invstd, (running_var.double() + case.eps).rsqrt(), rtol=1e-15, atol=0)
        return
    exact_mean, exact_var = reference.statistics(input)
    deviation = exact_var.sqrt()
    assert ((mean - exact_mean).abs() / deviation).max() < 2**-22
    torch.testing.assert_close(invstd, (exact_var + case.eps).rsqrt(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("mask", list(itertools.product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("case", [p for p in CASES if p.weight and p.bias], ids=named)
def test_output_mask(case: Case, mask: tuple[bool, ...], device: str) -> None:
    """A result is the same whatever else is asked for, and None if it is not asked for."""
    arguments = backward_arguments(case, device)
    every = OPS.batch_norm_backward(*arguments)
    for name, wanted, one, other in zip(
        ("dx", "dweight", "dbias", "dresidual"),
        mask,
        OPS.batch_norm_backward(*arguments[:-1], list(mask)),
        every,
        strict=True,
    ):
        if wanted:
            assert_same_sums(one, other, name)
        else:
            assert one is None, name


def test_counter(device: str) -> None:
    arguments = list(arguments_of(Case((5, 3)), device))
    counter = arguments[5]
    OPS.batch_norm(*arguments)
    assert counter.item() == 4
    arguments[6] = False
    OPS.batch_norm(*arguments)
    assert counter.item() == 4


# ---------------------------------------------------------------------------------------------- without data


def assert_alike(one: Tensor, other: Tensor) -> None:
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert same_format(one, other)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_fake_tensors(case: Case, device: str) -> None:
    """Shapes, dtypes and strides as of real ones, also of the gradients; the counter is not read."""
    arguments = arguments_of(case, device, gradients=True, momentum=None if case.mode.running else 0.1)
    real = OPS.batch_norm(*arguments)
    leaves = [arguments[i] for i in (0, 1, 2, 9) if arguments[i] is not None]
    real_grads = torch.autograd.grad(real.sum(), leaves)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments]
        fake = OPS.batch_norm(*fakes)
        fake_grads = torch.autograd.grad(fake.sum(), [fakes[i] for i in (0, 1, 2, 9) if fakes[i] is not None])
    assert_alike(fake, real)
    for one, other in zip(fake_grads, real_grads, strict=True):
        assert_alike(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_meta_device(training: bool) -> None:
    module = bn_ext.BatchNorm2d(3, device="meta").train(training)
    input = torch.randn(2, 3, 4, 5, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    output = module(input)
    assert output.is_meta
    assert same_format(output, input)
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert module.weight.grad.shape == (3,)


@pytest.mark.parametrize("shape", [(4, 0, 4), (0, 3, 4), (4, 3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("set_size", [None, 3])
def test_no_values_on_meta(shape: tuple[int, ...], set_size: int | None) -> None:
    sizes = []
    for device in ("cpu", "meta"):
        x, weight = torch.ones(shape, device=device), torch.ones(shape[1], device=device)
        statistics = OPS.batch_norm_stats(x, set_size)
        norm = x, weight, None, weight.clone(), weight.clone(), None, 0.1, 1e-5, None, 0, 0.0, set_size, False
        output, mean, invstd, _ = OPS.batch_norm_forward(*norm)
        behind = True, None, None, 0, 0.0, set_size, [True, True, True, False]
        gradients = OPS.batch_norm_backward(x, x, weight, None, mean, invstd, *behind)
        sizes.append([t.shape for t in (*statistics, output, mean, invstd, *gradients[:3])])
    assert sizes[0] == sizes[1]


WRONG = {
    "weight": (1, lambda t: torch.cat([t, t]), "weight should contain (4|s.*) elements not (8|2.s)"),
    "running_var": (4, lambda t: t[1:], "running_var should contain (4|s.*) elements not (3|s.* - 1)"),
    "dtype": (2, lambda t: t.double(), "expected bias of type Float"),
    "one value per channel": (0, lambda t: t[:1, :, :1, :1], "more than 1 value per channel"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("where", ["real", "meta", "fake", "symbolic"])
def test_mistakes_are_seen_without_data(wrong: str, where: str, device: str) -> None:
    i, change, message = WRONG[wrong]
    arguments = list(arguments_of(Case((3, 4, 2, 3)), "meta" if where == "meta" else device))
    if where in ("fake", "symbolic"):
        mode = FakeTensorMode(shape_env=ShapeEnv() if where == "symbolic" else None, static_shapes=where == "fake")
        arguments = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments]
    arguments[i] = change(arguments[i])
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.batch_norm(*arguments)


LOWER = (OPS.batch_norm_forward.default, OPS.batch_norm_forward.evaluation, OPS.batch_norm_backward.default)


def lower_arguments(op: OpOverload, device: str) -> dict[str, Any]:
    mode = EVALUATION if op is OPS.batch_norm_forward.evaluation else TRAINING
    case = Case((3, 4, 5), mode=mode, residual=True, activation="relu")
    backward = op is OPS.batch_norm_backward.default
    given = backward_arguments(case, "cpu") if backward else forward_call(case, "cpu")[1]
    names = [argument.name for argument in op._schema.arguments]
    return {name: a.to(device) if isinstance(a, Tensor) else a for name, a in zip(names, given, strict=False)}


def with_each(change: Callable[[Tensor], Tensor]) -> Callable[[dict], list[dict]]:
    """Each tensor changed in turn."""
    return lambda given: [{name: change(t)} for name, t in given.items() if isinstance(t, Tensor)]


# What is changed, if the operator has such arguments.
UNFIT: dict[str, Callable[[dict], list[dict]]] = {
    "device": with_each(lambda t: torch.empty_like(t, device="cpu" if t.is_meta else "meta")),
    "number of values": with_each(lambda t: torch.cat([t.flatten(), t.flatten()])),
    "type": with_each(Tensor.cfloat),
    "sizes of dy": lambda given: [{"dy": given["dy"].transpose(0, 1)}],
    "sizes of the residual": lambda given: [{"residual": given["input"].transpose(0, 1)}],
    "rank": lambda given: [{"input": given["input"].flatten(1)}],
    "one value a channel": lambda given: [
        {"input": given["input"][:1, :, :1], "residual": None, "with_branches": False, "momentum": 0.1}
    ],
    "one of the statistics": lambda given: [{"running_var": None}],
    "eps": lambda given: [{"eps": -1.0}],
    "activation": lambda given: [{"activation": -1}, {"activation": len(NAMES)}],
    "activation without bits": lambda given: [{"activation": NAMES.index("silu")}],
    "no input, which is needed": lambda given: [
        {"input": None, "training": True},
        {"input": None, "training": False},  # for dweight
        {"input": None, "training": False, "branches": None, "output_mask": [True, False, True, True]},
    ],
    "strided statistics": lambda given: [{"mean": torch.stack([given["mean"]] * 2, 1)[:, 0]}],
    "sets of one value": lambda given: [
        {"input": given["input"][:, :, :1], "residual": None, "momentum": 0.1, "set_size": 1}
    ],
    "set_size": lambda given: [{"set_size": 0}],
    "scalar for sets": lambda given: [
        {n: t.to(given["dy"].device) for n, t in {"dy": torch.randn(2, 1, 3), "input": torch.randn(2, 1, 3)}.items()}
        | {"weight": None, "bias": None, "branches": None, "set_size": 2, "activation": 0}
        | {"mean": given["mean"].sum(), "invstd": given["mean"][:1]}
    ],
    "counter of floats": lambda given: [{"num_batches_tracked": given["num_batches_tracked"].float()}],
    "overlapping statistics": lambda given: [
        {"running_mean": given["running_mean"][:1].expand(4), "momentum": 0.1},
        dict(zip(("running_mean", "running_var"), given["running_mean"].new_ones(5).unfold(0, 4, 1)), momentum=0.1),
    ],
}


@pytest.mark.parametrize("wrong", UNFIT)
@pytest.mark.parametrize("op", LOWER, ids=str)
def test_lower_operators_refuse_the_same_on_every_device(op: OpOverload, wrong: str) -> None:
    """In the same words. A single meta tensor brings a call to the fake kernel, whose outputs on a CPU would hold
    anything."""
    errors: dict[str, list] = {"cpu": [], "meta": []}
    for where, found in errors.items():
        arguments = lower_arguments(op, where)
        op(**arguments)
        try:
            changes = [change for change in UNFIT[wrong](arguments) if change.keys() <= arguments.keys()]
        except KeyError:
            changes = []
        for change in changes:
            before = {name: t.clone() for name, t in arguments.items() if isinstance(t, Tensor)}
            with pytest.raises((RuntimeError, NotImplementedError, ValueError)) as error:
                op(**{**arguments, **change})
            found.append((error.type, re.sub("cpu|meta", "here", str(error.value))))
            assert where == "meta" or all(torch.equal(arguments[name], t) for name, t in before.items())
    assert errors["cpu"] == errors["meta"]


# ---------------------------------------------------------------------------------------------- strided vectors


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_strided_parameters_and_statistics(types, layout, training: bool, device: str) -> None:
    """Every second element of a longer vector; the others are neither read nor written."""
    case = Case((3, 7, 4, 5), layout, types, Mode(training, True))
    arguments = list(arguments_of(case, device))
    expected = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
    reference_output = OPS.batch_norm(*expected)
    wide = {}
    for i in (1, 2, 3, 4):
        wide[i] = torch.full((14,), torch.nan, dtype=arguments[i].dtype, device=device)
        arguments[i] = wide[i][::2].copy_(arguments[i])
    assert torch.equal(OPS.batch_norm(*arguments), reference_output)
    for i in (3, 4):
        assert torch.equal(arguments[i], expected[i])
        assert wide[i][1::2].isnan().all(), "written between the elements"
