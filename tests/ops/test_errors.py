"""Mistakes: the exception that torch raises, named argument and sizes, and nothing changed by a rejected call."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import MODES, Case, Result, Types, run_reference
from compare import ulps_off
from modules import CHANNELS
from torch import Tensor

import bn_ext

C = CHANNELS


def good(device: str) -> dict:
    """Arguments of a call that is right."""
    return {
        "input": torch.randn(4, C, 5, 2, device=device),
        "running_mean": torch.zeros(C, device=device),
        "running_var": torch.ones(C, device=device),
        "weight": torch.ones(C, device=device),
        "bias": torch.zeros(C, device=device),
        "training": True,
    }


def long(t: Tensor) -> Tensor:
    return torch.zeros(C + 1, dtype=t.dtype, device=t.device)


# Each case: what is wrong, how the right argument is made so, and what the message names.
MISTAKES = {
    "running_mean too long": ({"running_mean": long}, "running_mean.*6.*7"),
    "running_var too long": ({"running_var": long}, "running_var.*6.*7"),
    "weight too long": ({"weight": long}, "weight.*6.*7"),
    "bias too long": ({"bias": long}, "bias.*6.*7"),
    "weight empty": ({"weight": lambda t: t[:0]}, "weight.*6.*0"),
    "only a mean": ({"running_var": None}, "running_mean and running_var"),
    "only a variance": ({"running_mean": None}, "running_mean and running_var"),
    "evaluation without statistics": ({"running_mean": None, "running_var": None, "training": False}, "running_mean"),
    "evaluation without variance": ({"running_var": None, "training": False}, "running_var"),
    "one value per channel": ({"input": lambda t: t[:1, :, :1, :1]}, r"more than 1 value per channel.*\[1, 6, 1, 1\]"),
    "no input": ({"input": None, "training": False}, "input.*NoneType"),
    "no dimension": ({"input": lambda t: t.sum(), "training": False}, r"\(N, C, ...\), got \[\]"),
    "one dimension": ({"input": lambda t: t[0, :, 0, 0]}, r"\(N, C, ...\), got \[6\]"),
    "integers": ({"input": lambda t: t.long()}, "not implemented for 'Long'"),
    "complex": ({"input": lambda t: t + 0j}, "not implemented for 'ComplexFloat'"),
    "boolean weight": ({"weight": lambda t: t.bool()}, "(?i)weight|mixed dtype"),
    "double weight": ({"weight": lambda t: t.double()}, "(?i)weight|mixed dtype"),
    "double bias": ({"bias": lambda t: t.double()}, "(?i)bias|Double"),
    "double statistics": ({"running_mean": lambda t: t.double()}, "(?i)running_mean|mixed dtype"),
    "half weight": ({"weight": lambda t: t.half()}, "(?i)weight|mixed dtype"),
    "weight elsewhere": ({"weight": lambda t: t.to("meta")}, "(?i)device|meta"),
    "eps zero": ({"eps": 0.0}, "eps must be positive.*0"),
    "eps negative": ({"eps": -1.0}, "eps must be positive.*-1"),
    "eps negative in evaluation": ({"eps": -1.0, "training": False}, "eps must be non-negative.*-1"),
    "differentiable running_mean": ({"running_mean": lambda t: t.clone().requires_grad_()}, "running_mean"),
    "differentiable running_var": ({"running_var": lambda t: t.clone().requires_grad_()}, "running_var|running_mean"),
}


def wrong(mistake: str, device: str) -> dict:
    """Arguments with this mistake."""
    arguments = good(device)
    for name, change in MISTAKES[mistake][0].items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rejected_as_by_torch(mistake: str, device: str) -> None:
    message = MISTAKES[mistake][1]
    arguments = wrong(mistake, device)
    on_cpu = {k: v.to("cpu") if isinstance(v, Tensor) and v.is_cuda else v for k, v in arguments.items()}
    kind = Exception  # torch's own were others before 2.13, and some not there
    if torch.__version__ >= (2, 13):
        with pytest.raises(Exception) as torchs:
            torch.nn.functional.batch_norm(**on_cpu)
        kind = torchs.type
    before = {k: (v.detach().clone(), v._version) for k, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(kind, match=message) as ours:
        bn_ext.functional.batch_norm(**arguments)
    assert kind in (Exception, ours.type), f"{ours.type} where torch raises {kind}"
    for name, (value, version) in before.items():
        assert value.is_meta or torch.equal(arguments[name], value), f"a rejected call changed {name}"
        assert arguments[name]._version == version, f"a rejected call wrote to {name}"


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m != "weight elsewhere"])
def test_rejected_alike_on_meta(mistake: str) -> None:
    errors = []
    for device in ("cpu", "meta"):
        with pytest.raises(Exception) as error:
            bn_ext.functional.batch_norm(**wrong(mistake, device))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_rejected_alike_when_compiled(mistake: str, device: str) -> None:
    """Dynamo raises an error of its own with ours in it, or ours, and nothing is changed."""
    torch._dynamo.reset()
    arguments = wrong(mistake, device)
    before = {k: v.detach().clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(Exception) as eager:
        bn_ext.functional.batch_norm(**arguments)
    with pytest.raises(Exception) as compiled:
        torch.compile(lambda a: bn_ext.functional.batch_norm(**a), backend="eager")(arguments)
    assert compiled.type is eager.type or f"got {eager.value!r}" in str(compiled.value)
    assert str(eager.value) in str(compiled.value)
    assert all(v.is_meta or torch.equal(arguments[k], v) for k, v in before.items())


@pytest.mark.parametrize("momentum", [None, "a"])
def test_momentum_is_a_number(momentum, device: str) -> None:
    """None is the cumulative average, for which the function, unlike the module, has no counter."""
    arguments = good(device)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        bn_ext.functional.batch_norm(**arguments, momentum=momentum)
    assert not arguments["running_mean"].any()


MODULE_MISTAKES = [
    ("BatchNorm1d", (C,), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
    ("BatchNorm1d", (2, C, 3, 3), ValueError, r"expected 2D or 3D input \(got 4D input\)"),
    ("BatchNorm2d", (2, C, 3), ValueError, r"expected 4D input \(got 3D input\)"),
    ("BatchNorm3d", (2, C, 3, 3), ValueError, r"expected 5D input \(got 4D input\)"),
    ("BatchNorm1d", (1, C), ValueError, r"more than 1 value per channel.*\[1, 6\]"),
    ("BatchNorm2d", (1, C, 1, 1), ValueError, r"more than 1 value per channel.*\[1, 6, 1, 1\]"),
    ("BatchNorm2d", (2, C + 1, 3, 3), RuntimeError, "running_mean should contain 7 elements not 6"),
    ("BatchNorm2d", (2, 1, 3, 3), RuntimeError, "running_mean should contain 1 elements not 6"),
]


@pytest.mark.parametrize("mistake", MODULE_MISTAKES, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_rejected_by_the_module(mistake: tuple, momentum: float | None, device: str) -> None:
    """Unlike torch's, ours does not count the rejected batch."""
    name, shape, error, message = mistake
    module = getattr(bn_ext, name)(C, momentum=momentum, device=device)
    theirs = getattr(torch.nn, name)(C, momentum=momentum, device=device)
    with pytest.raises(error, match=message):
        theirs(torch.randn(shape, device=device))
    with pytest.raises(error, match=message):
        module(torch.randn(shape, device=device))
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.running_mean, torch.zeros(C, device=device))
    assert torch.equal(module.running_var, torch.ones(C, device=device))


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked", "weight", "input"])
def test_inference_tensors(name: str, device: str) -> None:
    """Refused where torch's refuses them, and nothing is changed."""
    for training, gradients in itertools.product((True, False), repeat=2):
        errors = []
        for kind in (torch.nn.BatchNorm2d, bn_ext.BatchNorm2d):
            module, input = kind(C, device=device).train(training), torch.randn(4, C, 5, 2, device=device)
            with torch.inference_mode():
                if name == "input":
                    input = input.clone()
                else:
                    old = getattr(module, name)
                    setattr(module, name, torch.nn.Parameter(old.clone()) if name == "weight" else old.clone())
            before = copy.deepcopy(module.state_dict())
            try:
                with torch.set_grad_enabled(gradients):
                    module(input)
                errors.append(None)
            except RuntimeError as error:
                errors.append(type(error))
                if kind is bn_ext.BatchNorm2d:
                    assert re.search("(?i)inference tensor.*clone.*" + name, str(error))
                    assert all(map(torch.equal, module.state_dict().values(), before.values()))
        if not training and name.startswith("running"):  # torch's backward wants them, ours does not
            errors[0] = None
        assert errors[0] == errors[1], f"training {training}, gradients {gradients}"


CALLS = [bn_ext.BatchNorm1d(3), lambda x: bn_ext.functional.batch_norm(x, None, None, training=True)]


@pytest.mark.parametrize("call", CALLS, ids=["module", "function"])
def test_values_of_what_is_no_tensor_are_not_printed(call: Callable) -> None:
    with pytest.raises(TypeError) as caught:
        call(np.ones((100, 3)))
    assert str(caught.value) == "batch_norm(): argument 'input' must be Tensor, not ndarray"


RESIDUALS = [
    bn_ext.BatchNorm1d(3),
    lambda x, residual: bn_ext.functional.batch_norm(x, None, None, training=True, residual=residual),
    bn_ext.nn.BatchNormLast(3),
    bn_ext.nn.SharedBatchNorm1d(3, 1),
    lambda x, residual: bn_ext.nn.DomainBatchNorm1d(3, 2)(x, 1, residual),
]


@pytest.mark.parametrize("call", RESIDUALS, ids=["module", "function", "last", "shared", "domain"])
def test_values_of_a_residual_that_is_no_tensor_are_not_printed(call: Callable) -> None:
    with pytest.raises(TypeError, match=r"^batch_norm\(\): argument 'residual' must be Tensor, not ndarray$"):
        call(torch.ones(100, 3), np.ones((100, 3)))


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("types", [Types(*t) for t in itertools.product(FLOATS, repeat=3)], ids=str)
def test_every_mixture_of_number_types(types: Types, training: bool, device: str) -> None:
    """Ours accepts what torch accepts, and refuses the rest with nothing changed, or computes it right."""
    a = Case((4, C, 5, 2), types=types, mode=MODES[0 if training else 2]).arguments(device)
    arguments = a.input, a.running_mean, a.running_var, a.weight, a.bias, training
    expected = run_reference(a)
    before = a.running_mean.clone(), a.running_var.clone()
    try:
        output = bn_ext.functional.batch_norm(*arguments)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            torch.nn.functional.batch_norm(*(t.cpu() if isinstance(t, Tensor) else t for t in arguments))
        assert a.running_mean.equal(before[0]), "a rejected call changed running_mean"
        assert a.running_var.equal(before[1]), "a rejected call changed running_var"
        return
    ours = Result(output, a.running_mean, a.running_var)
    for part, mine, exact, scale in zip(Result._fields[:3], ours, *expected, strict=False):
        assert ulps_off(mine, exact, scale) <= 2, f"{part} is wrong"
