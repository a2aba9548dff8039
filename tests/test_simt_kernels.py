"""The CUDA kernels, run on the model of a GPU: against torch and the float64 formulas, for every strategy of a plan, in
any order of threads, under AddressSanitizer; and what becomes of them when they are broken."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_no_worse
from problems import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    LAYOUTS,
    MODES,
    TYPES,
    Arguments,
    Problem,
    Result,
    Types,
    channels_last,
    contiguous,
    run,
    run_reference,
    run_torch,
)
from simt.batch_norm import Device, Kernels, Tail, Work, batch_norm, empty_mask, problem_of
from simt.build import ROOT, sanitized
from torch import Tensor

from bn_ext.activation import NAMES

KIB = 1024
HALF = Types(torch.float16, torch.float32, torch.float32)

# GPUs of two multiprocessors or so, with hardly more shared memory than sums need: small tensors have to be shared.
ROOMY = Device(8, 48 * KIB, 100 * KIB, 16)
CLUSTERS = Device(2, 36 * KIB, 74 * KIB, 16)
NO_CLUSTERS = Device(2, 40 * KIB, 82 * KIB, 1)
DEVICES = {"roomy": ROOMY, "clusters": CLUSTERS, "no clusters": NO_CLUSTERS}

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
    Problem(shape, layout, types)
    for shape, layout, types in itertools.product(SHAPES, LAYOUTS[:2], [FLOAT, DOUBLE, HALF, BFLOAT])
    if layout is contiguous or len(shape) > 2
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def check(kernels: Kernels, problem: Problem, device: Device) -> None:
    a = problem.arguments("cpu")
    ours = run(batch_norm(kernels, device), a, backward=True)
    assert_no_worse(ours, run_torch(a, True), run_reference(a, True), str(problem.mode))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("problem", GRID, ids=str)
def test_grid(problem: Problem, device: Device, kernels: Kernels) -> None:
    for mode in MODES:
        check(kernels, replace(problem, mode=mode), device)


def test_every_strategy_is_on_the_grid(kernels: Kernels) -> None:
    works = [Work(1, (1,), (1,), 1, (1,)), Work(2, (2,), (2,), 2, (1,)), Work(1, (0,), (1,), 1, (1,))]
    inputs = [p.layout(torch.empty(p.shape, dtype=p.types.input)) for p in GRID]
    cases = itertools.product(map(problem_of, inputs), works, DEVICES.values())
    assert {kernels.plan(*case) for case in cases} == {
        "elementwise block",
        "small block",
        "resident block",
        "resident cluster",
        "resident grid",
        "streaming grid",
    }


# One problem for each way through the kernels: rows of one channel or of several; a block, a cluster, a grid that
# holds everything or streams.
WAYS = [
    ((2, 32, 8, 8), contiguous, ROOMY),
    ((5, 35, 7), contiguous, ROOMY),
    ((2, 3, 50, 60), contiguous, CLUSTERS),
    ((64, 5, 7, 7), contiguous, CLUSTERS),
    ((600, 35), contiguous, NO_CLUSTERS),
    ((1, 2, 8193), contiguous, NO_CLUSTERS),
    ((2, 40, 25, 30), channels_last, NO_CLUSTERS),
]
ways = pytest.mark.parametrize(
    ("shape", "layout", "device"), WAYS, ids=lambda v: str(v) if isinstance(v, tuple) else ""
)


class Pass(NamedTuple):
    """What one forward and one backward give."""

    y: Tensor
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def both_passes(
    kernels: Kernels, problem: Problem, device: Device, momentum: float | None = None, **of_backward: Any
) -> Pass:
    a = problem.arguments("cpu")
    running = a.running_mean.clone(), a.running_var.clone()
    batches = torch.tensor(41)
    out = kernels.forward(device, a.input, *running, a.weight, a.bias, a.training, momentum, batches=batches)
    gradients = kernels.backward(device, a.dy, a.input, a.weight, a.bias, *out[1:], a.training, **of_backward)
    return Pass(*out, *running, batches, *gradients[:3])


def assert_same_bits(one: Pass | Result, other: Pass | Result) -> None:
    for part, a, b in zip(one._fields, one, other, strict=True):
        assert (a is None) == (b is None), part
        assert a is None or torch.equal(a, b), part


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_any_order_of_threads_gives_the_same_bits(shape, layout, device, types: Types, kernels: Kernels) -> None:
    kernels.configure()
    in_order = both_passes(kernels, Problem(shape, layout, types), device)
    for seed in range(1, 9):
        kernels.configure(seed, preempt=seed % 3 * 20)
        torch.manual_seed(0)
        assert_same_bits(both_passes(kernels, Problem(shape, layout, types), device), in_order)
    kernels.configure()


@ways
def test_one_launch_a_pass(shape, layout, device, kernels: Kernels) -> None:
    kernels.configure()
    both_passes(kernels, Problem(shape, layout), device)
    assert kernels.launches() == 2


@ways
def test_cumulative_average(shape, layout, device, kernels: Kernels) -> None:
    """Without a momentum, that of the 42nd batch is 1 / 42; and it is counted once."""
    cumulative = both_passes(kernels, Problem(shape, layout), device, None)
    torch.manual_seed(0)
    assert_same_bits(cumulative, both_passes(kernels, Problem(shape, layout), device, 1 / 42))
    assert cumulative.batches.item() == 42


@ways
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
def test_subsets_of_the_gradients(shape, layout, device, mode, kernels: Kernels) -> None:
    """What is asked for is bitwise the same whatever else is."""
    problem = Problem(shape, layout, mode=mode)
    every = both_passes(kernels, problem, device)
    for wanted in itertools.product((False, True), repeat=3):
        if any(wanted):
            torch.manual_seed(0)
            some = both_passes(kernels, problem, device, wanted=(*wanted, False))
            for part, want in zip(("dx", "dweight", "dbias"), wanted):
                assert not want or torch.equal(getattr(some, part), getattr(every, part)), f"{part} of {wanted}"


@ways
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_number_types(shape, layout, device, types: Types, kernels: Kernels) -> None:
    check(kernels, Problem(shape, layout, types), device)


@ways
@pytest.mark.parametrize("affine", [(True, False), (False, True), (False, False)], ids=str)
def test_without_weight_or_bias(shape, layout, device, affine, kernels: Kernels) -> None:
    for mode in MODES:
        check(kernels, Problem(shape, layout, FLOAT, mode, *affine), device)


@ways
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_mean_far_from_zero(shape, layout, device, offset: float, kernels: Kernels) -> None:
    check(kernels, Problem(shape, layout, FLOAT, offset=offset), device)


@ways
@pytest.mark.parametrize("rest", [0.0, 1.0])
@pytest.mark.parametrize("value", [1.2345, 300.0, 1e4])
def test_outlier_that_comes_first(shape, layout, device, value: float, rest: float, kernels: Kernels) -> None:
    """What a thread reads first is what it takes distances from: it must not be far from all else."""
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
    a = Problem(shape, layout, types).arguments("cpu")
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
    problem = Problem(shape, layout, types)
    torch.manual_seed(0)
    aligned = both_passes(kernels, problem, device)
    torch.manual_seed(0)
    shifted = replace(problem, layout=lambda x: unaligned(layout(x)))
    assert_same_bits(both_passes(kernels, shifted, device), aligned)


def limits_of(device: Device) -> tuple[int, ...]:
    """A device as it can be sent to another process."""
    return tuple(getattr(device, name) for name, _ in Device._fields_)


def passes_of(problem: Problem, device: tuple[int, ...], seed: int) -> Pass:
    """In a process with AddressSanitizer."""
    kernels = Kernels(sanitize=True)
    kernels.configure(seed)
    torch.manual_seed(0)
    return both_passes(kernels, problem, Device(*device))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_is_read_or_written_out_of_bounds(shape, types: Types, device: Device, kernels: Kernels) -> None:
    kernels.configure()
    for layout in (contiguous, channels_last)[: 1 if len(shape) == 2 else 2]:
        problem = Problem(shape, layout, types)
        torch.manual_seed(0)
        plain = both_passes(kernels, problem, device)
        assert_same_bits(sanitized().submit(passes_of, problem, limits_of(device), 1).result(), plain)


# The activations with a bit for each element that says all of z that a gradient needs.
BRANCHES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: z <= 0,
    "relu6": lambda z: (z <= 0) | (z >= 6),
    "leaky_relu": lambda z: z > 0,
    "hardsigmoid": lambda z: (z > -3) & (z < 3),
}
PARAMS = {"leaky_relu": 0.2, "elu": 0.7}


def together(
    kernels: Kernels, device: Device, a: Arguments, mask: Tensor | None = None, wanted: Sequence[bool] | None = None
) -> Result:
    """By the kernels: a forward fills the mask, if there is one, and its backward takes that for the residual."""
    tail = Tail(a.activation or "identity", a.param, a.residual, mask)
    running = a.running_mean.clone(), a.running_var.clone()
    y, *statistics = kernels.forward(device, a.input, *running, a.weight, a.bias, a.training, tail=tail)
    if mask is not None:
        tail = tail._replace(residual=None)
    inputs = a.dy, a.input, a.weight, a.bias, *statistics, a.training
    wanted = wanted or (True, True, True, a.residual is not None)
    return Result(y, *running, *kernels.backward(device, *inputs, wanted, tail))


def bits_of(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as a tensor of bools, laid out as ``like``."""
    bits = mask.unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1).bool().flatten()
    return bits.as_strided(like.shape, like.stride())


@ways
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, HALF, BFLOAT], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_activations(name: str, types: Types, shape, layout, device, kernels: Kernels) -> None:
    """As torch's operators, each with a tensor for its result; in training and evaluation, one with a residual."""
    slack = 1 if name in BRANCHES else 2  # exp and its like have their own error in the last place
    odd = (NAMES.index(name) + len(shape) + types.input.itemsize // 2) % 2 == 1
    for mode, residual in zip((MODES[0], MODES[2]), (odd, not odd)):
        fused = {"residual": residual, "activation": name, "activation_param": PARAMS.get(name)}
        a = Problem(shape, layout, types, mode, **fused).arguments("cpu")
        results = [together(kernels, device, a)]
        if name in BRANCHES and residual:
            mask = empty_mask(a.input)
            results.append(together(kernels, device, a, mask))
            assert torch.equal(results[0].dresidual, results[1].dresidual), "the backward finds another z"
            z = together(kernels, device, replace(a, activation=None)).output
            if types in (FLOAT, DOUBLE) or name in ("relu", "leaky_relu"):  # rounded, it could reach the other branches
                assert torch.equal(bits_of(mask, a.input), BRANCHES[name](z))
        of_torch, exact = run_torch(a, True), run_reference(a, True)
        for ours in results:
            assert_no_worse(ours, of_torch, exact, f"{mode}, residual: {residual}", slack)


class Masked(NamedTuple):
    """A result and its mask, as bools, where its activation has one."""

    result: Result
    mask: Tensor | None


def masked(kernels: Kernels, device: Device, problem: Problem, seed: int = 0, name: str = "relu") -> Masked:
    """With a residual and an activation."""
    kernels.configure(seed, preempt=seed % 3 * 20)
    torch.manual_seed(0)
    a = replace(problem, residual=True, activation=name).arguments("cpu")
    mask = empty_mask(a.input) if name in BRANCHES else None
    result = together(kernels, device, a, mask)
    kernels.configure()
    return Masked(result, None if mask is None else bits_of(mask, a.input))


def assert_same(one: Masked, other: Masked) -> None:
    assert one.mask is None or torch.equal(one.mask, other.mask), "mask"
    assert_same_bits(one.result, other.result)


@ways
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_any_order_of_threads_gives_the_same_mask(shape, layout, device, types: Types, kernels: Kernels) -> None:
    problem = Problem(shape, layout, types)
    in_order = masked(kernels, device, problem)
    for seed in range(1, 4):
        assert_same(masked(kernels, device, problem, seed), in_order)


@ways
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_residuals_that_are_not_aligned(shape, layout, device, types: Types, kernels: Kernels) -> None:
    problem = Problem(shape, layout, types)
    shifted = replace(problem, layout=lambda x: unaligned(layout(x)))
    assert_same(masked(kernels, device, shifted), masked(kernels, device, problem))


@ways
@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=str)
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_subsets_of_the_gradients_of_a_chain(name: str, shape, layout, device, mode, kernels: Kernels) -> None:
    a = Problem(shape, layout, mode=mode, residual=True, activation=name).arguments("cpu")
    mask = empty_mask(a.input) if name == "relu" else None
    every = together(kernels, device, a, mask)
    for wanted in itertools.product((False, True), repeat=4):
        if any(wanted):
            some = together(kernels, device, a, mask, wanted)
            expected = every._replace(**{part: None for part, want in zip(Result._fields[3:], wanted) if not want})
            assert_same_bits(some, expected)


def masked_of(problem: Problem, device: tuple[int, ...], seed: int) -> Masked:
    """In a process with AddressSanitizer."""
    return masked(Kernels(sanitize=True), Device(*device), problem, seed)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_no_mask_is_read_or_written_out_of_bounds(shape, types: Types, device: Device, kernels: Kernels) -> None:
    problem = Problem(shape, contiguous, types)
    plain = masked(kernels, device, problem)
    assert_same(sanitized().submit(masked_of, problem, limits_of(device), 1).result(), plain)


class Broken(NamedTuple):
    """What is wrong, where, and what is said of it; one way through the kernels on which it matters."""

    name: str
    file: str
    right: str
    wrong: str
    error: str
    way: int


BROKEN = [
    Broken(
        "missing barrier",
        "team_sums.h",
        "gpu::thread(), mine[l]);\n    }\n    gpu::sync_block();",
        "gpu::thread(), mine[l]);\n    }",
        r"reads element \d+ .*(which nothing wrote|wrote with no barrier)",
        2,
    ),
    Broken(
        "missing barrier before the coefficients are read",
        "kernel.h",
        "    gpu::sync_block();\n",
        "",
        r"reads element \d+ .*(which nothing wrote|wrote with no barrier)",
        0,
    ),
    Broken(
        "missing barrier of the cluster",
        "team_sums.h",
        "      gpu::sync_cluster();\n      sum_entries",
        "      sum_entries",
        "before a cluster barrier|which nothing wrote",
        2,
    ),
    Broken(
        "block that ends early",
        "team_sums.h",
        "      gpu::sync_cluster();\n    }\n  }\n\n private",
        "    }\n  }\n\n private",
        "returns its block's shared memory|has returned",
        2,
    ),
    Broken("counter that is not set", "team_sums.h", "*arrivals_ = 0;", "", "deadlock: .*arrivals", 4),
    Broken(
        "one arrival too many",
        "team_sums.h",
        "meetings_ * g_.team_blocks)",
        "meetings_ * g_.team_blocks + 1)",
        "deadlock: .* with 2 of 3 arrivals",
        4,
    ),
    Broken(
        "lanes that do not come",
        "team_sums.h",
        "    double sum = 0;\n",
        "    if (k >= channels) {\n      break;\n    }\n    double sum = 0;\n",
        "deadlock: .*shuffle_xor",
        1,
    ),
    Broken(
        "wrong lane mask",
        "team_sums.h",
        "shuffle_xor(gpu::kAllLanes,",
        "shuffle_xor(0x7fffffff,",
        "which `lanes` does not name|do not name the caller",
        0,
    ),
    Broken(
        "off by one",
        "slab.h",
        "rest < kLanes ? rest : kLanes",
        "rest < kLanes ? rest + 1 : kLanes",
        "heap-buffer-overflow",
        1,
    ),
    Broken(
        "unguarded tail",
        "slab.h",
        "i < packs_ ? channels_ * g_.s - position : 0",
        "channels_ * g_.s - position",
        "heap-buffer-overflow",
        5,
    ),
    Broken(
        "tile without room",
        "kernel.h",
        "i + u < g_.held && j",
        "i + u <= g_.held && j",
        "out of bounds|which nothing wrote",
        5,
    ),
]


# What no barrier, bound or address is broken by, and what then differs.
WRONG = [
    Broken(
        "bits in another order",
        "mask.h",
        "bits <<= turn * kLanes",
        "bits <<= (kThreads - 1 - turn) * kLanes",
        "mask",
        0,
    ),
    Broken("bits that do not meet", "mask.h", "bits |= gpu::shuffle_xor", "gpu::shuffle_xor", "mask", 0),
    Broken("a byte of others too", "slab.h", "whole_bytes(!plan.zeroed_mask)", "whole_bytes(true)", "mask", 1),
    Broken("a mask of anything", "forward.cu", "if (plan.zeroed_mask)", "if (false)", "mask", 1),
    Broken("no atomic", "mask.h", "gpu::atomic_or(word, low)", "*word = low", "mask", 1),
    Broken("bits of the next word", "mask.h", "high != 0", "false", "mask", 1),
    Broken("no residual", "forward.cu", "z = z + batch.tensor[1][u].get(l);", "", "mask", 0),
    Broken("no residual behind it", "backward.cu", "z = z + batch.tensor[2][u].get(l);", "", "dx", 0),
    Broken("a gradient of a gradient", "kernel.h", "if (i + u >= g_.held)", "", "dx", 0),
]


def write_broken(broken: Broken, folder: Path, functor: str) -> None:
    """The file that is wrong, and for quick compilation headers that know no number type but float and one functor."""
    for name, right, wrong in (
        (f"cuda/{broken.file}", re.escape(broken.right), broken.wrong),
        ("core/dtype.h", r"return f\(.*\);", "return f(float{});"),
        ("core/activation.h", r"return f\(activation::.*\);", f"return f(activation::{functor});"),
    ):
        source = (ROOT / "csrc" / name).read_text()
        changed = re.sub(right, lambda _, wrong=wrong: wrong, source)
        assert changed != source
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(changed)


def broken_passes(folder: str, sanitize: bool, shape: tuple[int, ...], layout: Any, limits: tuple[int, ...]) -> None:
    kernels = Kernels("broken", sanitize=sanitize, include=[Path(folder)])
    for seed in range(4):
        kernels.configure(seed)
        both_passes(kernels, Problem(shape, layout), Device(*limits))


@pytest.mark.parametrize("broken", BROKEN, ids=[b.name for b in BROKEN])
def test_what_is_broken_is_found(broken: Broken, tmp_path: Path) -> None:
    write_broken(broken, tmp_path, "Identity{}")
    shape, layout, device = WAYS[broken.way]
    of_memory = "heap" in broken.error
    case = str(tmp_path), of_memory, shape, layout, limits_of(device)
    with pytest.raises(RuntimeError, match=f"(?s)kernel batch_norm_(forward|backward): .*({broken.error})"):
        sanitized().submit(broken_passes, *case).result() if of_memory else broken_passes(*case)


@pytest.mark.parametrize("wrong", WRONG, ids=[w.name for w in WRONG])
def test_what_is_wrong_differs(wrong: Broken, tmp_path: Path, kernels: Kernels) -> None:
    write_broken(wrong, tmp_path, "Any{{}, a}")
    shape, layout, device = WAYS[wrong.way]
    name = "silu" if wrong.error == "dx" else "relu6"
    each = kernels, Kernels("broken", include=[tmp_path])
    right, broken = (masked(k, device, Problem(shape, layout), name=name) for k in each)
    with pytest.raises(AssertionError, match=wrong.error):
        assert_same(broken, right)
