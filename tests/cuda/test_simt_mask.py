"""The CUDA kernels with a mask, on the model of a GPU: what counts, and how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BFLOAT, DOUBLE, FLOAT, MODES, Arguments, Case, Types, channels_last, contiguous
from masked import MASKS, assert_close, expected, mask_of, off_kinks, without_others
from simt.batch_norm import Device, Kernels, Tail, empty_branches, like
from simt.build import sanitized
from simt.passes import BRANCHES, CLUSTERS, NO_CLUSTERS, ROOMY, WAYS, limits_of
from test_simt_broken import Broken, write_broken
from torch import Tensor

HALF = Types(torch.float16, torch.float32, torch.float32)
CHAINS = [(None, False), ("relu", True), ("silu", True), ("relu", False), (None, True), ("silu", False)]

# Masks that one block adds up and that several do; sets of one image, of some images, with a smaller last one; one
# channel.
SETS = [
    ((6, 35, 7), contiguous, 1),
    ((7, 3, 50, 60), contiguous, 3),
    ((9, 33, 5, 7), channels_last, 4),
    ((600, 35), contiguous, 64),
    ((10, 1, 9), contiguous, 4),
    ((8, 1, 9), contiguous, 4),
    ((5, 2, 5001), contiguous, 2),
]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value)) if not isinstance(value, Device) else ""


ways = pytest.mark.parametrize(("shape", "layout", "device"), WAYS, ids=named)
sets = pytest.mark.parametrize(("shape", "layout", "set_size"), SETS, ids=named)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def arguments(case: Case, name: str, set_size: int | None = None) -> tuple[Arguments, Tensor]:
    """The arguments of a case, with NaN where its mask is 0, and the mask."""
    torch.manual_seed(0)
    a = case.arguments("cpu")
    mask = mask_of(name, a.input)
    a = without_others(a, mask)
    return off_kinks(a, mask, set_size), mask


def fused(kernels: Kernels, device: Device, a: Arguments, mask: Tensor, set_size: int | None = None) -> dict:
    """All results, of a counter that began with 3 batches."""
    branches = empty_branches(a.input) if a.activation in BRANCHES and a.residual is not None else None
    tail = Tail(a.activation or "identity", a.param, a.residual, branches)
    running, batches = (a.running_mean.clone(), a.running_var.clone()), torch.tensor(3)
    of_channels = *running, a.weight, a.bias, a.training, a.momentum, a.eps, batches
    y, mean, invstd = kernels.forward(device, a.input, *of_channels, tail, set_size, mask)
    if branches is not None:
        tail = tail._replace(residual=None)
    inputs = a.dy, a.input, a.weight, a.bias, mean, invstd, a.training, (True, True, True, a.residual is not None)
    gradients = kernels.backward(device, *inputs, tail, set_size, mask=mask)
    names = "output", "mean", "invstd", "running_mean", "running_var", "batches", "dx", "dweight", "dbias", "dresidual"
    return dict(zip(names, (y, mean, invstd, *running, batches, *gradients), strict=True))


@ways
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, HALF, BFLOAT], ids=str)
def test_what_counts(shape, layout, device, types: Types, kernels: Kernels) -> None:
    """In training and evaluation; bools and weights, and each chain, by turns."""
    kernels.configure()
    turn = [way[0] for way in WAYS].index(shape) + [FLOAT, DOUBLE, HALF, BFLOAT].index(types)
    for i, mode in enumerate((MODES[0], MODES[2])):
        activation, residual = CHAINS[(turn + 3 * i) % len(CHAINS)]
        case = Case(shape, layout, types, mode, residual=residual, activation=activation)
        a, mask = arguments(case, MASKS[(turn + i) % 3])
        found = fused(kernels, device, a, mask)
        assert_close(found, expected(a, mask), mask)
        assert found["batches"] == (4 if mode.training else 3)


@pytest.mark.parametrize("device", [ROOMY, NO_CLUSTERS], ids=["roomy", "no clusters"])
@sets
@pytest.mark.parametrize("name", MASKS)
def test_sets(shape, layout, set_size: int, name: str, device: Device, kernels: Kernels) -> None:
    """Also those in which one value counts, or none."""
    kernels.configure()
    turn = [one[0] for one in SETS].index(shape) + MASKS.index(name)
    activation, residual = CHAINS[turn % len(CHAINS)]
    types = [FLOAT, BFLOAT, DOUBLE][turn % 3]
    case = Case(shape, layout, types, residual=residual, activation=activation)
    a, mask = arguments(case, name, set_size)
    found = fused(kernels, device, a, mask, set_size)
    assert_close(found, expected(a, mask, set_size), mask)
    moved = name not in ("one value", "nothing")
    assert found["batches"] == 3 + moved
    assert moved or torch.equal(found["running_mean"], a.running_mean)
    assert moved or torch.equal(found["running_var"], a.running_var)


@ways
@pytest.mark.parametrize("name", ["one value", "nothing"])
def test_too_little_to_count(shape, layout, device, name: str, kernels: Kernels) -> None:
    kernels.configure()
    for momentum in (0.1, None):
        a, mask = arguments(Case(shape, layout), name)
        running, batches = (a.running_mean.clone(), a.running_var.clone()), torch.tensor(3)
        y, mean, _ = kernels.forward(
            device, a.input, *running, a.weight, a.bias, True, momentum, batches=batches, mask=mask
        )
        assert batches == 3 and torch.equal(running[0], a.running_mean) and torch.equal(running[1], a.running_var)
        values = a.input.movedim(1, -1)[mask > 0]
        assert torch.equal(mean, values.sum(0).double())
        assert torch.equal(y.movedim(1, -1)[mask > 0], a.bias.expand_as(values))


@ways
@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_mean_far_from_zero(shape, layout, device, offset: float, kernels: Kernels) -> None:
    a, mask = arguments(Case(shape, layout, offset=offset), "weights")
    found, exact = fused(kernels, device, a, mask), expected(a, mask)
    for name in ("mean", "invstd"):
        torch.testing.assert_close(found[name], exact[name], rtol=3e-7, atol=3e-7)


@ways
def test_outlier_that_comes_first(shape, layout, device, kernels: Kernels) -> None:
    """Threads take distances from a value that must not be far from all else."""
    x = torch.randn(shape)
    mask = mask_of("bools", x)
    mask.view(-1)[0], x[0].view(shape[1], -1)[:, 0] = 1, 1e4
    _, mean, invstd = kernels.forward(device, layout(x), None, None, None, None, mask=mask)
    values = x.double().movedim(1, -1)[mask > 0]
    torch.testing.assert_close(mean, values.mean(0), rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(invstd, (values.var(0, correction=0) + 1e-5).rsqrt(), rtol=3e-7, atol=0)


@ways
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_floats_cannot_sum(shape, layout, device, value: float, kernels: Kernels) -> None:
    """Where it counts it stays in its channel."""
    a, mask = arguments(Case(shape, layout), "bools")
    n, *at = (mask == 1).nonzero()[-1].tolist()
    a.input[(n, 1, *at)] = value
    _, mean, _ = kernels.forward(device, a.input, None, None, None, None, mask=mask)
    values = a.input.double().movedim(1, -1)[mask > 0]
    torch.testing.assert_close(mean, values.mean(0), equal_nan=True)


@ways
def test_launches(shape, layout, device, kernels: Kernels) -> None:
    """One more, where the sums of the mask are needed."""
    for mode, launches in ((MODES[0], 4), (MODES[2], 2)):
        a, mask = arguments(Case(shape, layout, mode=mode), "bools")
        kernels.configure()
        fused(kernels, device, a, mask)
        assert kernels.launches() == launches


@sets
def test_blocks_that_add_up_a_mask(shape, layout, set_size: int, kernels: Kernels) -> None:
    """One for each 8192 numbers of a set."""
    a, mask = arguments(Case(shape, layout), "bools", set_size)
    kernels.configure()
    kernels.stats(ROOMY, a.input, set_size, mask)
    first, second = kernels.library.launches()
    assert (first.kernel, second.kernel) == ("batch_norm_mask", "batch_norm_forward")
    of_set = mask[:set_size].numel()
    assert first.blocks == -(-len(mask) // set_size) * -(-of_set // 8192)


@ways
def test_a_mask_of_ones_changes_little(shape, layout, device, kernels: Kernels) -> None:
    torch.manual_seed(0)
    a = Case(shape, layout).arguments("cpu")
    ones = torch.ones_like(mask_of("bools", a.input))
    masked, plain = (fused(kernels, device, a, mask) for mask in (ones, None))
    for name, one in plain.items():
        assert one is None or torch.allclose(masked[name].double(), one.double(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("name", [None, "relu"])
def test_a_frozen_layer_needs_no_input(name: str | None, kernels: Kernels) -> None:
    case = Case((5, 35, 7), mode=MODES[2], residual=name is not None, activation=name)
    a, mask = arguments(case, "bools")
    branches = empty_branches(a.input) if name else None
    tail = Tail(name or "identity", 0, a.residual, branches)
    of_channels = a.running_mean, a.running_var, a.weight, a.bias, False
    _, *statistics = kernels.forward(ROOMY, a.input, *of_channels, tail=tail, mask=mask)
    wanted = True, False, True, name is not None
    inputs = a.dy, a.input, a.weight, a.bias, *statistics, False, wanted, tail._replace(residual=None)
    dx, _, dbias, dresidual = kernels.backward(ROOMY, *inputs, mask=mask, reads_x=False)
    exact = expected(a, mask)
    exact = {part: exact[part] for part in ("dx", "dbias", "dresidual") if part in exact}
    assert_close({"dx": dx, "dbias": dbias, "dresidual": dresidual}, exact, mask)


def composed(kernels: Kernels, device: Device, a: Arguments, mask: Tensor, set_size: int | None) -> dict:
    """The results of the stages, one after the other."""
    tail = Tail(a.activation or "identity", a.param, a.residual)
    counts, mean, m2 = kernels.stats(device, a.input, set_size, mask)
    of_sets = counts if set_size is None else counts.unsqueeze(1)
    invstd = 1 / (torch.where(of_sets > 0, m2 / of_sets, 0) + a.eps).sqrt()
    y = kernels.elemt(device, a.input, a.weight, a.bias, mean, invstd, set_size, tail, mask)
    inputs = a.dy, a.input, a.weight, a.bias, mean, invstd
    sums = torch.full((2, *mean.shape), torch.nan, dtype=torch.float64)
    kernels.backward_stage(device, inputs, sums, set_size=set_size, tail=tail, mask=mask)
    dx, dresidual = like(a.input), None if a.residual is None else like(a.input)
    kernels.backward_stage(device, inputs, sums, counts, (dx, dresidual), set_size, tail, mask)
    return {"counts": counts, "output": y, "mean": mean, "invstd": invstd, "dx": dx, "dresidual": dresidual}


STAGES = [*((*way[:2], None, way[2]) for way in WAYS[1::2]), *((*one, NO_CLUSTERS) for one in SETS)]


@pytest.mark.parametrize(("shape", "layout", "set_size", "device"), STAGES, ids=named)
def test_stages(shape, layout, set_size: int | None, device: Device, kernels: Kernels) -> None:
    turn = [one[0] for one in STAGES].index(shape)
    types, name = [FLOAT, BFLOAT][turn % 2], ["weights", "second half"][turn // 2 % 2]
    a, mask = arguments(Case(shape, layout, types, residual=True, activation="silu"), name, set_size)
    found, exact = composed(kernels, device, a, mask, set_size), expected(a, mask, set_size)
    assert_close(found, {part: exact[part] for part in found if part in exact}, mask)
    counts = torch.stack([part.double().sum() for part in mask.split(set_size or len(mask))])
    torch.testing.assert_close(found["counts"], counts)


@pytest.mark.parametrize(
    ("shape", "layout", "set_size", "device"),
    [((5, 35, 7), contiguous, 2, ROOMY), ((2, 3, 9000), contiguous, None, CLUSTERS), (*SETS[-1], NO_CLUSTERS)],
    ids=named,
)
def test_any_order_of_threads_gives_the_same_bits(shape, layout, set_size, device, kernels: Kernels) -> None:
    a, mask = arguments(Case(shape, layout, BFLOAT, residual=True, activation="relu"), "weights", set_size)
    results = []
    for seed in range(3):
        kernels.configure(seed, preempt=20 * (seed % 2))
        results.append(fused(kernels, device, a, mask, set_size))
    kernels.configure()
    for name, first in results[0].items():
        assert all(torch.equal(first, other[name]) for other in results[1:]), name


def under_sanitizer(case: Case, set_size: int | None, limits: tuple[int, ...]) -> dict:
    a, mask = arguments(case, "weights", set_size)
    return fused(Kernels(sanitize=True), Device(*limits), a, mask, set_size)


@pytest.mark.parametrize(
    ("shape", "layout", "set_size"),
    [((33, 65), contiguous, None), ((6, 3, 33, 31), contiguous, None), *SETS],
    ids=named,
)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
def test_nothing_is_read_or_written_out_of_bounds(shape, layout, set_size, types: Types, kernels: Kernels) -> None:
    kernels.configure()
    case = Case(shape, layout, types, residual=True, activation="relu")
    plain = fused(kernels, NO_CLUSTERS, *arguments(case, "weights", set_size), set_size)
    clean = sanitized().submit(under_sanitizer, case, set_size, limits_of(NO_CLUSTERS)).result()
    for name, one in plain.items():
        assert torch.equal(one, clean[name]), name


# ``error`` names the result that differs; ``way`` is the shape below.
SHAPES = [((6, 35, 7), contiguous, 2), ((7, 3, 50, 60), contiguous, 3), ((5, 2, 5001), contiguous, 2)]
BROKEN = [
    Broken(
        "NaN in the moments",
        "passes/forward.cu",
        "mask.counts(l) ? Factors<B>{mask.weigh(l, d), d} : Factors<B>{0, 0}",
        "Factors<B>{mask.weigh(l, d), d}",
        "mean",
        0,
    ),
    Broken("NaN in the output", "passes/forward.cu", "mask.keep(l, known.value(z))", "known.value(z)", "output", 1),
    Broken("NaN in dz", "passes/backward.cu", "mask.counts(l) ? gradient", "true ? gradient", "dresidual", 0),
    Broken("NaN in a sum of products", "passes/backward.cu", "mask.keep(l, d)", "d", "dweight", 0),
    Broken("NaN in dx", "passes/backward.cu", "mask.keep(l, own)", "own", "dx", 1),
    Broken("no weight through statistics", "passes/backward.cu", "mask.weigh(l, through)", "through", "dx", 0),
    Broken("weights of another row", "kernel/slab.h", "row_ + row, position", "row, position", "output", 1),
    Broken("weights of another position", "kernel/mask.h", "position + 1 < s ? position + 1 : 0", "0", "output", 0),
    Broken(
        "batches that do not count are counted",
        "passes/forward.cu",
        "freedom_of_all(args_.problem, args_.mask) <= 0",
        "false",
        "batches",
        0,
    ),
    Broken("one part for all", "passes/mask.cu", "if (args.parts > 1)", "if (false)", "mean", 2),
    Broken("a part too early", "passes/mask.cu", "arrivals + set, args.parts)", "arrivals + set, 1)", "mean", 2),
    Broken("no total", "passes/mask.cu", "args.counted[sets] =", "args.counted[0] =", "mean", 0),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[b.name for b in BROKEN])
def test_what_is_broken_differs(broken: Broken, tmp_path: Path, kernels: Kernels) -> None:
    write_broken(broken, tmp_path, "Any{{}, a}")
    wrong = Kernels("broken", include=[tmp_path])
    shape, layout, set_size = SHAPES[broken.way]
    name = "nothing" if broken.error == "batches" else "weights"
    a, mask = arguments(Case(shape, layout, residual=True, activation="silu"), name, set_size)
    right, other = (fused(k, NO_CLUSTERS, a, mask, set_size) for k in (kernels, wrong))
    differ = [part for part, one in right.items() if not torch.equal(one, other[part])]
    assert broken.error in differ, differ


def test_a_missing_barrier_of_the_sums_is_found(tmp_path: Path) -> None:
    right = "all.write(t, mine);\n  gpu::sync_block();"
    broken = Broken("missing barrier", "passes/mask.cu", right, "all.write(t, mine);", "", 0)
    write_broken(broken, tmp_path, "Any{{}, a}")
    shape, layout, set_size = SHAPES[0]
    a, mask = arguments(Case(shape, layout), "weights", set_size)
    with pytest.raises(RuntimeError, match=r"kernel batch_norm_mask: .*(which nothing wrote|wrote with no barrier)"):
        fused(Kernels("broken", include=[tmp_path]), NO_CLUSTERS, a, mask, set_size)
