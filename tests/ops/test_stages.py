"""The stages as operators: together they are the fused operators, alone they take what those refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BFLOAT, DOUBLE, FLOAT, Case, Types, channels_last, contiguous, strided
from staged import composed, fused
from torch import Tensor
from torch._subclasses import FakeTensorMode

import bn_ext
from bn_ext.stages import Chain, Moments, Statistics, Sums, backward_elemt, backward_reduce, elemt, merge_stats, stats

OPS = torch.ops.bn_ext
SHAPES = [(5, 3), (300, 130), (2, 35, 7), (6, 1, 100), (16, 33, 14, 14), (8, 64, 7, 7), (4, 2, 70001)]
TAILS = [(False, None), (False, "relu"), (True, "relu"), (True, "silu"), (True, None)]
tails = pytest.mark.parametrize(("residual", "activation"), TAILS, ids=str)
set_sizes = pytest.mark.parametrize("set_size", [None, 2])


SHARED = {"running_mean", "running_var", "batches"}  # by sets, which do not move them where they stay apart


@set_sizes
@tails
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_stages_are_the_fused_operators(
    shape, layout, types: Types, residual: bool, activation: Any, set_size: int | None, device: str
) -> None:
    """Bit by bit on the CPU, but for what torch computes there: square roots in float64 for sets that stay apart, and
    sums over sets. On a GPU sums may be cut in another way."""
    a = Case(shape, layout, types, residual=residual, activation=activation).arguments(device)
    keeps_branches = activation == "relu" and types != FLOAT
    whole, parts = fused(a, set_size), composed(a, set_size, keeps_branches)
    whole = {name: one for name, one in whole.items() if set_size is None or name not in SHARED}
    assert whole.keys() == parts.keys()
    for name, one in whole.items():
        of_torch = set_size is not None and (types == DOUBLE or name in ("dweight", "dbias"))
        if device == "cpu" and not of_torch:
            assert torch.equal(parts[name], one), name
        else:
            eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0
            bound = (8 if types == DOUBLE else 1) * eps * max(1, one.double().abs().max().item())
            torch.testing.assert_close(parts[name].double(), one.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(7, 3, 4), (5, 20, 33)], ids=str)
def test_sets_may_have_parameters_of_their_own(shape, layout, device: str) -> None:
    """Each set is a call by itself, bit by bit."""
    case = Case(shape, layout, FLOAT, residual=True, activation="silu").arguments(device)
    x, dy, chain = case.input, case.dy, Chain(case.residual, "silu")
    moments = stats(x, 2)
    rows = Statistics(*moments.each())
    weight, bias = (torch.randn(len(rows.counts), shape[1], device=device).t().contiguous().t() for _ in range(2))
    output, _ = elemt(x, rows, weight, bias, chain, 2)
    sums = backward_reduce(dy, x, rows, weight, bias, chain, 2)
    dx, dresidual = backward_elemt(dy, x, rows, sums, weight, bias, chain, 2)
    for i, images in enumerate(torch.arange(len(x)).split(2)):
        one, of_one = Chain(case.residual[images], "silu"), (weight[i], bias[i])
        statistics, its_sums = Statistics(*(t[i] for t in rows)), Sums(*(t[i] for t in sums))
        assert torch.equal(output[images], elemt(x[images], statistics, *of_one, one)[0])
        again = backward_reduce(dy[images], x[images], statistics, *of_one, one)
        assert all(map(torch.equal, its_sums, again))
        gradients = backward_elemt(dy[images], x[images], statistics, its_sums, *of_one, one)
        assert torch.equal(dx[images], gradients[0])
        assert torch.equal(dresidual[images], gradients[1])


def test_statistics_of_sets(device: str) -> None:
    x = (torch.randn(7, 3, 4, device=device) + 1e3).double()
    count, mean, m2 = stats(x.float(), 3)
    assert count.tolist() == [12, 12, 4]
    for i, part in enumerate(x.float().double().split(3)):
        torch.testing.assert_close(mean[i], part.mean((0, 2)), rtol=1e-9, atol=0)
        torch.testing.assert_close(m2[i], (part - part.mean((0, 2), True)).square().sum((0, 2)), rtol=1e-4, atol=0)


# ---------------------------------------------------------------------------------------------- little and nothing


@pytest.mark.parametrize(("shape", "set_size"), [((0, 3, 4), None), ((0, 3, 4), 2), ((2, 3, 0), None), ((5, 3, 0), 2)])
def test_no_values(shape, set_size, device: str) -> None:
    x = torch.randn(shape, device=device)
    moments = stats(x, set_size)
    rows = [] if set_size is None else [-(-shape[0] // set_size)]
    assert [list(t.shape) for t in moments] == [rows, [*rows, 3], [*rows, 3]]
    assert all(not t.any() for t in moments)
    statistics = moments.each()
    output, _ = elemt(x, statistics, set_size=set_size)
    sums = backward_reduce(x, x, statistics, set_size=set_size)
    dx, _ = backward_elemt(x, x, statistics, sums, set_size=set_size)
    assert output.shape == dx.shape == shape
    assert all(not t.any() for t in sums)
    merged = merge_stats(moments, eps=0.25)
    assert (merged.counts, merged.mean.tolist(), merged.invstd.tolist()) == (0, [0] * 3, [2] * 3)


def test_one_value_per_channel(device: str) -> None:
    x = torch.tensor([[3.0, -2.0]], device=device)
    running = torch.zeros(2, device=device), torch.ones(2, device=device)
    statistics = merge_stats(stats(x), *running, eps=0.25)
    assert (statistics.counts, statistics.mean.tolist(), statistics.invstd.tolist()) == (1, [3, -2], [2, 2])
    assert (running[0].tolist(), running[1].tolist()) == ([0, 0], [1, 1])
    assert not elemt(x, statistics)[0].any()
    sums = backward_reduce(torch.ones_like(x), x, statistics)
    assert (sums.dz.tolist(), sums.dz_xmu.tolist()) == ([1, 1], [0, 0])
    assert not backward_elemt(torch.ones_like(x), x, statistics, sums)[0].any()


# ---------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_the_statistics_of_all(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(11, 5, 6, device=device, dtype=torch.float64) + 3
    running = [torch.zeros(5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)]
    batches = torch.tensor(1, device=device)
    empty = stats(x[:0])
    rows = [torch.cat([a.view(-1, *a.shape[1:]), b.unsqueeze(0)]) for a, b in zip(stats(x, 4), empty, strict=True)]
    merged = merge_stats(Moments(*rows), *running, batches, None)
    assert merged.counts == 66
    torch.testing.assert_close(merged.mean, x.mean((0, 2)))
    torch.testing.assert_close(merged.invstd, (x.var((0, 2), correction=0) + 1e-5).rsqrt())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(running[0].double(), x.mean((0, 2)) / 2, rtol=4 * eps, atol=0)
    torch.testing.assert_close(running[1].double(), 0.5 + x.var((0, 2)) / 2, rtol=4 * eps, atol=0)
    assert batches == 2


def test_rows_are_merged_in_their_order(device: str) -> None:
    """Other orders give other bits."""
    moments = stats(torch.randn(64, 50, 3, device=device) * 10 + 1, 1)

    def merged(order: Tensor) -> tuple[Tensor, Tensor]:
        result = merge_stats(Moments(*(t[order].contiguous() for t in moments)))
        return result.mean, result.invstd

    def by_hand(c: int) -> tuple[float, float]:
        """Chan, Golub & LeVeque's formula from the first row to the last."""
        count = mean = m2 = 0.0
        for n, other, other_m2 in zip(*(t.tolist() for t in (moments.counts, moments.mean[:, c], moments.m2[:, c]))):
            part, delta = n / (count + n), other - mean
            m2 = m2 + other_m2 + delta * delta * count * part
            count, mean = count + n, mean + delta * part
        return mean, m2 / count

    forward, backward = merged(torch.arange(64)), merged(torch.arange(63, -1, -1))
    assert not torch.equal(forward[0], backward[0])
    mean, var = by_hand(7)
    assert abs(forward[0][7] - mean) <= 2**-52 * abs(mean)
    assert abs(forward[1][7] - (var + 1e-5) ** -0.5) <= 2**-51 * forward[1][7]


def test_buffers_show_that_they_were_written_to(device: str) -> None:
    running = torch.zeros(3, device=device), torch.ones(3, device=device)
    batches = torch.tensor(0, device=device)
    versions = [t._version for t in (*running, batches)]
    merge_stats(stats(torch.randn(4, 3, device=device)), *running, batches)
    assert [t._version for t in (*running, batches)] == [v + 1 for v in versions]


# ---------------------------------------------------------------------------------------------- autograd


class Composed(torch.autograd.Function):
    """A batch norm of stages, as whoever stands between them writes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, set_size: int | None) -> Tensor:
        moments = stats(x, set_size)
        statistics = merge_stats(moments) if set_size is None else moments.each()
        ctx.save_for_backward(x, weight, bias, *statistics)
        ctx.set_size = set_size
        return elemt(x, statistics, weight, bias, Chain(activation="silu"), set_size)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *rest = ctx.saved_tensors
        statistics, how = Statistics(*rest), (weight, bias, Chain(activation="silu"), ctx.set_size)
        sums = backward_reduce(dy, x, statistics, *how)
        dx, _ = backward_elemt(dy, x, statistics, sums, *how)
        return dx, *sums.gradients(statistics), None


@set_sizes
def test_gradcheck_of_a_composition(set_size: int | None, device: str) -> None:
    x, weight, bias = (
        torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in ((5, 3, 2), 3, 3)
    )
    assert torch.autograd.gradcheck(lambda *leaves: Composed.apply(*leaves, set_size), (x, weight, bias))


def test_a_second_derivative_is_refused(device: str) -> None:
    x, weight, bias = (torch.randn(s, device=device, requires_grad=True) for s in ((5, 3, 2), 3, 3))
    (dx,) = torch.autograd.grad(Composed.apply(x, weight, bias, None).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for bn_ext::batch_norm_backward_elemt is not implemented"):
        torch.autograd.grad(dx.sum(), x)


def test_a_stage_has_no_derivative(device: str) -> None:
    x = torch.randn(5, 3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="derivative for bn_ext::batch_norm_stats is not implemented"):
        stats(x).mean.sum().backward()


# ---------------------------------------------------------------------------------------------- as operators


def calls(layout: Callable, types: Types, set_size: int | None, device: str) -> dict[Any, tuple]:
    """Each stage with arguments that it takes."""
    a = Case((5, 3, 2, 4), layout, types, residual=True, activation="relu").arguments(device)
    moments = stats(a.input, set_size)
    statistics = moments.each()
    parameters = a.weight, a.bias, statistics.mean, statistics.invstd
    relu = bn_ext.activation.NAMES.index("relu"), 0.0
    _, branches = OPS.batch_norm_elemt(a.input, *parameters, a.residual, *relu, set_size, True)
    sums = OPS.batch_norm_backward_reduce(a.dy, a.input, *parameters, None, branches, *relu, set_size)
    running, batches = (a.running_mean, a.running_var), torch.tensor(3, device=device)
    fused = None, branches, *relu, set_size
    return {
        OPS.batch_norm_stats.default: (a.input, set_size),
        OPS.batch_norm_merge_stats.default: (*moments, *running, batches, None, 1e-5),
        OPS.batch_norm_elemt.default: (a.input, *parameters, a.residual, *relu, set_size, True),
        OPS.batch_norm_backward_reduce.default: (a.dy, a.input, *parameters, *fused),
        OPS.batch_norm_backward_elemt.default: (
            a.dy,
            a.input,
            *parameters,
            *sums,
            moments.counts,
            *fused,
            [True, True],
        ),
    }


NAMES = ["stats", "merge_stats", "elemt", "backward_reduce", "backward_elemt"]


@set_sizes
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last, strided], ids=lambda f: f.__name__)
def test_opcheck(layout, types, name: str, set_size, device: str) -> None:
    op = getattr(OPS, f"batch_norm_{name}").default
    torch.library.opcheck(op, calls(layout, types, set_size, device)[op])


@set_sizes
def test_fakes_are_like_real_results(set_size, device: str) -> None:
    for op, arguments in calls(channels_last, DOUBLE, set_size, device).items():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
        for one, other in zip(fake, real, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride()), op


def test_compiled_whole(device: str) -> None:
    def step(x: Tensor, dy: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
        statistics = merge_stats(stats(x), running_mean, running_mean.exp())
        y, _ = elemt(x, statistics, chain=Chain(activation="silu"))
        sums = backward_reduce(dy, x, statistics, chain=Chain(activation="silu"))
        return y, backward_elemt(dy, x, statistics, sums, chain=Chain(activation="silu"))[0]

    x, dy = torch.randn(2, 5, 3, 4, device=device)
    expected, running = step(x, dy, torch.zeros(3, device=device)), torch.zeros(3, device=device)
    for one, other in zip(torch.compile(step, fullgraph=True)(x, dy, running), expected, strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(running, x.mean((0, 2)) / 10)


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "type": ("mean", Tensor.float, "expected mean of type Double, got Float"),
    "rows": ("mean", lambda t: t[:1], "should hold (6|1) values"),
    "strides": ("invstd", lambda t: t.t().contiguous().t(), r"invstd should be contiguous, got strides \[1, 2\]"),
    "count": ("count", lambda t: t[:1], "count should hold 2 values"),
    "sums": ("sum_dz", lambda t: t[0], "sum_dz should hold 6 values"),
    "input": ("input", lambda t: t.flatten(), "should have sizes"),
    "integers": ("input", Tensor.int, "not implemented for 'Int'"),
    "weight": ("weight", lambda t: t[:2], "weight should contain 3 elements"),
    "weights of sets": ("weight", lambda t: t.expand(5, 3), r"weight should have sizes \(C,\) or \(sets, C\), 2 and 3"),
    "dy": ("dy", lambda t: t[:1], "expected dy like the input"),
    "residual": ("residual", lambda t: t[:1], "expected residual like the input"),
    "branches": ("branches", lambda t: t[:1], "branches should hold"),
    "mask": ("mask", lambda t: t[:1], "mask should hold"),
    "type of a mask": ("mask", Tensor.bool, "expected mask of type Float, got Bool"),
    "m2": ("m2", lambda t: t[:1], "m2 should hold"),
    "running_var": ("running_var", lambda t: t[:2], "running_var should hold 3 values"),
    "running_mean": ("running_mean", Tensor.long, "expected running_mean of type Double, Float, .*, got Long"),
    "counter": ("num_batches_tracked", Tensor.float, "expected num_batches_tracked of type Long, got Float"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes(wrong: str, device: str) -> None:
    """Each stage that takes the argument refuses it by its own name, and fakes do too, in the same words; nothing is
    written."""
    name, change, message = WRONG[wrong]
    refused = 0
    for op, arguments in calls(contiguous, FLOAT, 3, device).items():
        names = [a.name for a in op._schema.arguments]
        given: dict[str, Any] = dict(zip(names, arguments, strict=False))
        if "mask" in names:
            given["mask"] = torch.ones_like(given["input"][:, 0])
        if not isinstance(given.get(name), Tensor):
            continue
        before = {n: t.clone() for n, t in given.items() if isinstance(t, Tensor)}
        with pytest.raises((RuntimeError, NotImplementedError), match=message) as error:
            op(**given | {name: change(given[name])})
        assert all(torch.equal(given[n], t) for n, t in before.items())
        own_name = op._schema.name.partition("::")[2]
        assert wrong == "weight" or own_name in str(error.value)  # torch's words for it name no operator
        meta = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in given.items()}
        with pytest.raises(error.type) as without_data:
            op(**meta | {name: change(meta[name])})
        assert str(without_data.value) == str(error.value).replace(device, "meta")
        refused += 1
    assert refused


@pytest.mark.parametrize("meta", [False, True])
def test_what_does_not_fit_together(meta: bool, device: str) -> None:
    device = "meta" if meta else device
    x = torch.randn(4, 3, device=device)
    statistics = merge_stats(stats(x))
    running = torch.zeros(3, device=device)
    with pytest.raises(ValueError, match="set_size should be positive"):
        stats(x, 0)
    with pytest.raises(ValueError, match="either both be None or neither"):
        merge_stats(stats(x), running)
    with pytest.raises(ValueError, match="a cumulative average needs num_batches_tracked"):
        merge_stats(stats(x), running, running, momentum=None)
    with pytest.raises(ValueError, match="eps must be non-negative"):
        merge_stats(stats(x), eps=-1)
    with pytest.raises(RuntimeError, match="batch_norm_elemt: silu has no branches"):
        elemt(x, statistics, chain=Chain(x, "silu", keeps_branches=True))
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        elemt(x, statistics, chain=Chain(activation="ReLU"))


def test_sums_of_parameters() -> None:
    dz, dz_xmu, invstd = torch.randn(3, 2, 4, dtype=torch.float64)
    statistics = Statistics(torch.ones(2), torch.zeros(2, 4), invstd)
    dweight, dbias = Sums(dz, dz_xmu).gradients(statistics)
    torch.testing.assert_close(dweight, dz_xmu[0] * invstd[0] + dz_xmu[1] * invstd[1])
    torch.testing.assert_close(dbias, dz[0] + dz[1])


def test_a_refused_merge_changes_nothing(device: str) -> None:
    """Running statistics that a kernel cannot write to, or that autograd would miss."""
    moments, batches = stats(torch.randn(8, 6, 4, device=device), 2), torch.tensor(0, device=device)
    learnt = torch.zeros(6, device=device, requires_grad=True)
    for running in (torch.zeros(3, 2, device=device).t(), torch.zeros(1, device=device).expand(6), learnt * 1):
        with pytest.raises(RuntimeError):
            merge_stats(moments, running, torch.ones(6, device=device), batches)
        assert batches == 0
    memory = torch.ones(7, device=device)
    with pytest.raises(RuntimeError, match="running_mean and running_var share some of their memory"):
        merge_stats(moments, memory[:6], memory[1:], batches)
    assert batches == 0
    assert torch.equal(memory, torch.ones(7, device=device))


def test_statistics_made_in_inference_mode_are_merged_into(device: str) -> None:
    """Nothing is recorded that could miss the writes."""
    x = torch.randn(8, 6, 4, device=device)
    with torch.inference_mode():
        inference = [torch.zeros(6, device=device), torch.ones(6, device=device), torch.tensor(0, device=device)]
    normal = [t.clone() for t in inference]
    for running in (inference, normal):
        merge_stats(stats(x), *running)
    assert all(map(torch.equal, inference, normal))
    assert normal[2] == 1


@pytest.mark.parametrize("count", [0.0, -3.0, float("nan")])
def test_rows_whose_count_is_not_positive_count_for_nothing(count: float, device: str) -> None:
    counts, mean, m2 = stats(torch.randn(8, 6, 4, device=device), 2)
    others = merge_stats(Moments(counts[1:].contiguous(), mean[1:].contiguous(), m2[1:].contiguous()))
    counts[0] = count
    assert all(map(torch.equal, merge_stats(Moments(counts, mean, m2)), others))


def test_statistics_that_are_transposed(device: str) -> None:
    x = torch.randn(8, 6, 4, device=device)
    moments = stats(x, 2)
    turned = Statistics(moments.counts, *(t.t().contiguous() for t in moments.each()[1:]))
    with pytest.raises(RuntimeError, match="should have sizes"):
        elemt(x, turned, set_size=2)
    one = torch.tensor(1.0, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"mean should have sizes \(sets, C\), 1 and 1, got \[\]"):
        elemt(x[:1, :1], Statistics(one, one, one), set_size=2)
    with pytest.raises(RuntimeError, match=r"expected m2 like mean, of sizes \[4, 6\], got \[6, 4\]"):
        merge_stats(Moments(moments.counts, moments.mean, moments.m2.t().contiguous()))
