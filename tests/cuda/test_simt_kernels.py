"""The CUDA kernels, run on the model of a GPU: against torch and the float64 formulas, for every strategy of a plan, in
any order of threads, under AddressSanitizer. What becomes of them when they are broken: test_simt_broken.py."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace

import pytest
import simt.batch_norm
import torch
from cases import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    LAYOUTS,
    MODES,
    TYPES,
    Case,
    Result,
    Types,
    channels_last,
    contiguous,
    run,
    run_reference,
    run_torch,
)
from compare import assert_no_worse
from simt.batch_norm import Chain, Device, Kernels, Tail, Wants, batch_norm, empty_branches, problem_of
from simt.batch_norm import Pass as Call
from simt.build import sanitized
from simt.passes import (
    BRANCHES,
    DEVICES,
    ROOMY,
    WAYS,
    Chained,
    Pass,
    assert_same,
    assert_same_bits,
    bits_of,
    both_passes,
    chained,
    limits_of,
    together,
)
from torch import Tensor

from bn_ext.activation import NAMES

HALF = Types(torch.float16, torch.float32, torch.float32)

# S = 1, 3, 7, 35, 49, 1023; channels that are no multiple of a pack, of a slab; one channel; one image.
SHAPES = [
    (2, 1),
    (33, 65),
    (600, 35),
    (2, 3, 3),
    (5, 35, 7),
    (4, 8, 7, 7),
    (64, 5, 7, 7),
    (3, 33, 5, 7),
    (2, 3, 50, 60),
    (6, 3, 33, 31),
    (1, 2, 8193),
    (2, 32, 8, 8),
]
GRID = [
    Case(shape, layout, types)
    for shape, layout, types in itertools.product(SHAPES, LAYOUTS[:2], [FLOAT, DOUBLE, HALF, BFLOAT])
    if layout is contiguous or len(shape) > 2
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def check(kernels: Kernels, case: Case, device: Device) -> None:
    a = case.arguments("cpu")
    ours = run(batch_norm(kernels, device), a, backward=True)
    assert_no_worse(ours, run_torch(a, True), run_reference(a, True), str(case.mode))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("case", GRID, ids=str)
def test_grid(case: Case, device: Device, kernels: Kernels) -> None:
    for mode in MODES:
        check(kernels, replace(case, mode=mode), device)


def test_every_strategy_is_on_the_grid(kernels: Kernels) -> None:
    wants = Wants(dx=True, dweight=True, dbias=True)
    directions = [(0, True, Wants()), (1, True, wants), (0, False, Wants())]  # forward, backward, inference
    inputs = [p.layout(torch.empty(p.shape, dtype=p.types.input)) for p in GRID]
    calls = [Call(problem_of(x), *direction, Chain()) for x in inputs for direction in directions]
    assert {kernels.plan(*case) for case in itertools.product(calls, DEVICES.values())} == {
        "elementwise block",
        "small block",
        "resident block",
        "resident cluster",
        "resident grid",
        "streaming grid",
    }


ways = pytest.mark.parametrize(
    ("shape", "layout", "device"), WAYS, ids=lambda v: str(v) if isinstance(v, tuple) else ""
)


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_any_order_of_threads_gives_the_same_bits(shape, layout, device, types: Types, kernels: Kernels) -> None:
    kernels.configure()
    in_order = both_passes(kernels, Case(shape, layout, types), device)
    for seed in range(1, 9):
        kernels.configure(seed, preempt=seed % 3 * 20)
        torch.manual_seed(0)
        assert_same_bits(both_passes(kernels, Case(shape, layout, types), device), in_order)
    kernels.configure()


@ways
def test_one_launch_a_pass(shape, layout, device, kernels: Kernels) -> None:
    kernels.configure()
    both_passes(kernels, Case(shape, layout), device)
    assert kernels.launches() == 2


@ways
def test_cumulative_average(shape, layout, device, kernels: Kernels) -> None:
    """Without a momentum, that of the 42nd batch is 1 / 42; and it is counted once."""
    cumulative = both_passes(kernels, Case(shape, layout), device, None)
    torch.manual_seed(0)
    assert_same_bits(cumulative, both_passes(kernels, Case(shape, layout), device, 1 / 42))
    assert cumulative.batches.item() == 42


@ways
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
def test_subsets_of_the_gradients(shape, layout, device, mode, kernels: Kernels) -> None:
    """A result is bitwise the same whatever else is asked for."""
    case = Case(shape, layout, mode=mode)
    every = both_passes(kernels, case, device)
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            torch.manual_seed(0)
            some = both_passes(kernels, case, device, wanted=(*wanted, False))
            for part, want in zip(("dx", "dweight", "dbias"), wanted):
                assert not want or torch.equal(getattr(some, part), getattr(every, part)), f"{part} of {wanted}"


@ways
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_number_types(shape, layout, device, types: Types, kernels: Kernels) -> None:
    check(kernels, Case(shape, layout, types), device)


@ways
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias(shape, layout, device, affine, kernels: Kernels) -> None:
    for mode in MODES:
        check(kernels, Case(shape, layout, FLOAT, mode, *affine), device)


@ways
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_mean_far_from_zero(shape, layout, device, offset: float, kernels: Kernels) -> None:
    check(kernels, Case(shape, layout, FLOAT, offset=offset), device)


@ways
@pytest.mark.parametrize("rest", [0.0, 1.0])
@pytest.mark.parametrize("value", [1.2345, 300.0, 1e4])
def test_outlier_that_comes_first(shape, layout, device, value: float, rest: float, kernels: Kernels) -> None:
    """A thread takes distances from what it reads first, which must not be far from all else."""
    x = torch.randn(shape) * rest
    x[0].view(shape[1], -1)[:, 0] = value
    _, mean, invstd = kernels.forward(device, layout(x), None, None, None, None)
    values = x.double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, values.mean(1), rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(invstd, (values.var(1, correction=0) + 1e-5).rsqrt(), rtol=3e-7, atol=0)


@ways
def test_constant_channels(shape, layout, device, kernels: Kernels) -> None:
    x = torch.zeros(shape) + torch.linspace(-1e6, 1e6, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    y, mean, invstd = kernels.forward(device, layout(x), None, None, None, None, eps=1.0)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(mean, x[0].reshape(shape[1], -1)[:, 0].double())
    assert torch.equal(invstd, torch.ones_like(invstd))


@ways
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("where", [0, -1])
def test_what_floats_cannot_sum(shape, layout, device, value: float, where: int, kernels: Kernels) -> None:
    """NaN and Inf stay in their channel; what overflows a float does not overflow the sums."""
    x = torch.randn(shape)
    x[where, 1].view(-1)[where] = value
    x[where, 1].view(-1)[0] -= value / 2
    y, mean, _ = kernels.forward(device, layout(x), None, None, None, None)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, x.double().movedim(1, 0).flatten(1).mean(1), equal_nan=True)


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_several_infinities(shape, layout, device, types: Types, kernels: Kernels) -> None:
    """Mean and variance of what has Inf are torch's, though a thread may read nothing else at first."""
    a = Case(shape, layout, types).arguments("cpu")
    a.input[:, 0] = torch.inf
    a.input[: shape[0] // 2 + 1, 1] = -torch.inf
    ours, torchs = run(batch_norm(kernels, device), a, backward=True), run_torch(a, backward=True)
    assert ours.running_mean[:2].tolist() == [torch.inf, -torch.inf] and ours.running_var[:2].isnan().all()
    for part, mine, theirs in zip(Result._fields, ours, torchs, strict=True):
        if mine is not None:
            same = {"equal_nan": True, "rtol": 0.02, "atol": 0.02}  # in the other channels; how exactly, others test
            torch.testing.assert_close(mine, theirs, **same, msg=lambda m, part=part: f"{part}: {m}")


def unaligned(x: Tensor) -> Tensor:
    """The same values one element past an aligned address, and laid out the same."""
    storage = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)
    return storage[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_tensors_that_are_not_aligned(shape, layout, device, types: Types, kernels: Kernels) -> None:
    case = Case(shape, layout, types)
    torch.manual_seed(0)
    aligned = both_passes(kernels, case, device)
    torch.manual_seed(0)
    shifted = replace(case, layout=lambda x: unaligned(layout(x)))
    assert_same_bits(both_passes(kernels, shifted, device), aligned)


def passes_of(case: Case, device: tuple[int, ...], seed: int) -> Pass:
    """In a process with AddressSanitizer."""
    kernels = Kernels(sanitize=True)
    kernels.configure(seed)
    torch.manual_seed(0)
    return both_passes(kernels, case, Device(*device))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_read_or_written_out_of_bounds(shape, types: Types, device: Device, kernels: Kernels) -> None:
    kernels.configure()
    for layout in (contiguous, channels_last)[: 1 if len(shape) == 2 else 2]:
        case = Case(shape, layout, types)
        torch.manual_seed(0)
        plain = both_passes(kernels, case, device)
        assert_same_bits(sanitized().submit(passes_of, case, limits_of(device), 1).result(), plain)


PARAMS = {"leaky_relu": 0.2, "elu": 0.7, "celu": 0.7}


@ways
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activations(name: str, types: Types, shape, layout, device, kernels: Kernels) -> None:
    """The kernels give what torch's separate operators give: in training and evaluation, one of them with a residual;
    with and without branch bits."""
    slack = 1 if name in BRANCHES else 2  # exp and its like have their own error in the last place
    odd = (NAMES.index(name) + len(shape) + types.input.itemsize // 2) % 2 == 1
    for mode, residual in zip((MODES[0], MODES[2]), (odd, not odd)):
        fused = {"residual": residual, "activation": name, "activation_param": PARAMS.get(name)}
        a = Case(shape, layout, types, mode, **fused).arguments("cpu")
        results = [together(kernels, device, a)]
        if name in BRANCHES:
            branches = empty_branches(a.input)
            results.append(together(kernels, device, a, branches))
            for one, other in zip(results[0][:3], results[1][:3], strict=True):
                assert torch.equal(one, other), "the forward depends on branch bits"
            assert not residual or torch.equal(results[0].dresidual, results[1].dresidual), "there is another z"
            assert mode.training or torch.equal(results[0].dx, results[1].dx), "there is another z"
            z = together(kernels, device, replace(a, activation=None)).output
            if types in (FLOAT, DOUBLE) or name in ("relu", "leaky_relu"):  # rounded, it could reach the other branches
                assert torch.equal(bits_of(branches, a.input), BRANCHES[name](z))
        of_torch, exact = run_torch(a, True), run_reference(a, True)
        for ours in results:
            assert_no_worse(ours, of_torch, exact, f"{mode}, residual: {residual}", slack)


@ways
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_any_order_of_threads_gives_the_same_branch_bits(shape, layout, device, types: Types, kernels: Kernels) -> None:
    case = Case(shape, layout, types)
    in_order = chained(kernels, device, case)
    for seed in range(1, 4):
        assert_same(chained(kernels, device, case, seed), in_order)


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_residuals_that_are_not_aligned(shape, layout, device, types: Types, kernels: Kernels) -> None:
    case = Case(shape, layout, types)
    shifted = replace(case, layout=lambda x: unaligned(layout(x)))
    assert_same(chained(kernels, device, shifted), chained(kernels, device, case))


@ways
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_subsets_of_the_gradients_of_a_chain(name: str, shape, layout, device, mode, kernels: Kernels) -> None:
    a = Case(shape, layout, mode=mode, residual=True, activation=name).arguments("cpu")
    branches = empty_branches(a.input) if name == "relu" else None
    every = together(kernels, device, a, branches)
    for wanted in itertools.product((False, True), repeat=4):
        if any(wanted):
            some = together(kernels, device, a, branches, wanted)
            expected = every._replace(**{part: None for part, want in zip(Result._fields[3:], wanted) if not want})
            assert_same_bits(some, expected)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("types", [FLOAT, DOUBLE], ids=str)
def test_statistics_do_not_depend_on_branch_bits(types: Types, residual: bool, kernels: Kernels) -> None:
    """Rows of 7 values: those of 8 channels are whole bytes of branch bits, those of 4 channels are whole packs."""
    a = Case((67, 8, 7), types=types, residual=residual, activation="relu").arguments("cpu")
    with_branches, without = (
        kernels.forward(ROOMY, a.input, None, None, a.weight, a.bias, tail=Tail("relu", 0, a.residual, branches))
        for branches in (empty_branches(a.input), None)
    )
    assert all(map(torch.equal, with_branches, without))


@ways
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("name", ["identity", "relu", "relu6"])
def test_a_frozen_layer_needs_no_input(name: str, residual: bool, shape, layout, device, kernels: Kernels) -> None:
    """In evaluation, for all gradients but the weight's, the backward does without x: a bit tells the branch of z."""
    a = Case(shape, layout, mode=MODES[2], residual=residual, activation=name).arguments("cpu")
    branches = empty_branches(a.input) if name in BRANCHES else None
    writes_dresidual = residual and branches is not None
    for dx, dbias, dresidual in itertools.product((False, True), (False, True), {False, writes_dresidual}):
        wanted = dx, False, dbias, dresidual
        if any(wanted):
            without = together(kernels, device, a, branches, wanted, reads_x=False)
            assert_same_bits(without, together(kernels, device, a, branches, wanted))


def test_a_twin_of_another_size_is_found(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    class Epilogue(ctypes.Structure):
        _fields_ = [("activation", simt.batch_norm.Activation), ("branches", ctypes.c_void_p)]

    twins = [Epilogue if twin.__name__ == "Epilogue" else twin for twin in simt.batch_norm.MIRRORED]
    monkeypatch.setattr(simt.batch_norm, "MIRRORED", twins)
    with pytest.raises(AssertionError, match=r"Epilogue has 24 bytes, in C\+\+ 32"):
        simt.batch_norm.check_sizes(kernels.library)


def chained_of(case: Case, device: tuple[int, ...], seed: int) -> Chained:
    """In a process with AddressSanitizer."""
    return chained(Kernels(sanitize=True), Device(*device), case, seed)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_no_branch_bit_is_read_or_written_out_of_bounds(shape, types: Types, device: Device, kernels: Kernels) -> None:
    case = Case(shape, contiguous, types)
    plain = chained(kernels, device, case)
    assert_same(sanitized().submit(chained_of, case, limits_of(device), 1).result(), plain)
