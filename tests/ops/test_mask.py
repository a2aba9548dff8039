"""Masks: statistics over what counts, and nothing of what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import channels_last, contiguous
from cut_out import cut_out, poisoned
from torch import Tensor, nn
from torch.autograd import forward_ad

import bn_ext
from bn_ext.stages import Chain, backward_elemt, backward_reduce, elemt, merge_stats, stats

OPS = torch.ops.bn_ext

# Joined and whole planes, folded and plain rows, odd sizes, more than one chunk.
CASES = [
    ((5, 3, 7), contiguous),
    ((40, 9, 49), contiguous),
    ((9, 70, 14, 14), contiguous),
    ((3, 4, 1100), contiguous),
    ((1, 2, 70001), contiguous),
    ((2, 1, 33, 31), contiguous),
    ((6, 16, 8, 8), contiguous),
    ((300, 5), contiguous),
    ((700, 130), contiguous),
    ((4, 3, 9, 11), channels_last),
    ((4, 24, 5, 7), channels_last),
    ((3, 80, 13, 7), channels_last),
    ((2, 2100, 3, 5), channels_last),
]
cases = pytest.mark.parametrize(("shape", "layout"), CASES, ids=lambda p: getattr(p, "__name__", str(p)))
CHAINS = [(False, None), (True, None), (False, "relu"), (True, "relu"), (True, "silu")]
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def mask_of(shape: tuple[int, ...], kind: str, device: str) -> Tensor:
    mask = torch.rand(shape[0], *shape[2:], device=device)
    counts = mask > 0.4
    if kind == "stretches" and mask.dim() > 1:  # whole patches without a value that counts
        counts[:, : shape[2] // 2] = False
        counts[0] = False
        counts[-1, ..., -1] = True
    return counts if kind != "weights" else torch.where(counts, 4 * mask, -mask)


def tensors(shape: tuple[int, ...], layout: Any, dtype: torch.dtype, device: str) -> list[Tensor]:
    sizes = [shape, shape, shape, shape[1:2], shape[1:2]]
    made = [torch.randn(size, dtype=dtype, device=device) for size in sizes]
    return [
        layout(t + 3) if t.shape == shape and i == 0 else layout(t) if t.dim() > 1 else t for i, t in enumerate(made)
    ]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    bound = BOUNDS[dtype] * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("set_size", [None, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["bool", "weights", "stretches"])
@cases
def test_as_cut_out(shape, layout, kind: str, training: bool, set_size: int | None, device: str) -> None:
    """Results, gradients and running statistics are those of the values that count; the others, NaN here, do not
    matter, and get zeros."""
    set_size = 8 if set_size and len(shape) == 2 else set_size
    for dtype in BOUNDS if kind == "bool" else [torch.float64]:
        for with_residual, activation in CHAINS if dtype == torch.float64 and kind == "bool" else CHAINS[-2:]:
            mask = mask_of(shape, kind, device)
            x, dy, residual, weight, bias = tensors(shape, layout, dtype, device)
            residual = residual if with_residual else None
            running = torch.rand(2, shape[1], dtype=dtype, device=device)
            leaves = [None if t is None else t.requires_grad_() for t in (poisoned(x, mask), weight, bias)]
            if residual is not None:
                leaves.append(poisoned(residual, mask).requires_grad_())
            moved, batches = running.clone(), torch.tensor(3, device=device)
            norm = *leaves[:3], *moved, batches, training, 0.25, 1e-5
            y = OPS.batch_norm(*norm, leaves[3] if with_residual else None, activation, None, set_size, mask)
            found = torch.autograd.grad(y, leaves, poisoned(dy, mask))

            doubles = [t.detach().double().requires_grad_() for t in (x, weight, bias, *leaves[3:])]
            given = None if training else tuple(running.double())
            sets = set_size if training else None
            expected, statistics = cut_out(
                doubles[0], mask, *doubles[1:3], doubles[3] if with_residual else None, activation, sets, given
            )
            close(y, expected.detach(), dtype, "output")
            uncounted = ~(mask > 0).unsqueeze(1).expand_as(y)
            assert not y[uncounted].any()
            wanted = torch.autograd.grad(expected, doubles, dy.double())
            for name, one, other in zip(("dx", "dweight", "dbias", "dresidual"), found, wanted, strict=False):
                close(one, other, dtype, name)
                assert one.dim() == 1 or not one[uncounted].any(), name
            moves = training and "moves_to" in statistics
            assert batches == 3 + moves
            for one, before, target in zip(moved, running, statistics.get("moves_to", running), strict=True):
                new = before.double().lerp(target.detach().double(), 0.25) if moves else before.double()
                close(one, new, dtype, "running statistics")


def plain(x: Tensor, mask: Tensor, training: bool = True, **options: Any) -> Tensor:
    running = None if training else torch.ones(2, x.size(1), dtype=x.dtype, device=x.device)
    return bn_ext.functional.batch_norm(
        x, *(running if running is not None else (None, None)), None, None, training, **options, mask=mask
    )


# ---------------------------------------------------------------------------------------------- little and nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("counting", [0, 1, 2])
def test_few_values(counting: int, transformed: bool, dtype: torch.dtype, device: str) -> None:
    """With at most one value that counts nothing is written, and the output of one value is the bias."""
    x = torch.randn(3, 2, 5, dtype=dtype, device=device)
    mask = torch.zeros(3, 5, dtype=torch.bool, device=device)
    mask[1, 2 : 2 + counting] = True
    running = torch.ones(2, 2, dtype=dtype, device=device)
    batches = torch.tensor(7, device=device)
    bias = torch.tensor([3.0, -4.0], dtype=dtype, device=device)

    def call(x: Tensor) -> Tensor:
        return OPS.batch_norm(x, None, bias, *running, batches, True, None, 1e-5, mask=mask)

    with forward_ad.dual_level():  # standard operators answer where there is a tangent
        y = forward_ad.unpack_dual(call(forward_ad.make_dual(x, x) if transformed else x)).primal
    assert batches == 7 + (counting > 1)
    assert torch.equal(running, torch.ones_like(running)) == (counting < 2)
    assert torch.equal(y != 0, mask.unsqueeze(1).expand_as(x))
    if counting == 1:
        assert torch.equal(y[1, :, 2], bias)


def test_sets_without_values(device: str) -> None:
    """They neither get values nor give any: the others are as by themselves."""
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64, device=device)
    mask = torch.rand(6, 3, 3, device=device) > 0.3
    mask[2:4] = False
    runs = [torch.zeros(2, 4, dtype=torch.float64, device=device) for _ in range(2)]
    kept = [0, 1, 4, 5]
    for running, images in zip(runs, ([*range(6)], kept), strict=True):
        y = OPS.batch_norm(x[images], None, None, *running, None, True, 0.5, 1e-5, set_size=2, mask=mask[images])
    assert torch.equal(*runs)
    whole = OPS.batch_norm(x, None, None, None, None, None, True, 0.5, 1e-5, set_size=2, mask=mask)
    assert torch.equal(whole[kept], y)
    assert not whole[2:4].any()


@pytest.mark.parametrize("start", [0, 300, 1022, 5000])
def test_means_far_from_zero(start: int, device: str) -> None:
    """Cost no digits, wherever in a patch, or in which patch, the first values count: also if these are outliers, and
    what does not count is far away."""
    x = torch.randn(2, 3, 20000, device=device) + 3e4
    mask = torch.zeros(2, 20000, dtype=torch.bool, device=device)
    mask[:, start : start + 3] = True
    mask[:, 6000:] = torch.rand(2, 14000, device=device) > 0.2
    x[..., start : start + 3] += 300
    x[~mask.unsqueeze(1).expand_as(x)] = -1e30
    for t, of_t in ((x, mask), (x.movedim(1, -1).flatten(0, 1), mask.flatten())):
        _, found = cut_out(t.double(), of_t)
        counts, mean, m2 = stats(t, None, of_t)
        torch.testing.assert_close(mean, found["mean"][0], rtol=1e-9, atol=0)
        torch.testing.assert_close(m2 / counts, found["var"][0], rtol=2e-5, atol=0)


@pytest.mark.parametrize("shape", [(16000, 3), (300, 3, 49)], ids=str)
def test_the_first_value_is_far_from_all_others(shape: tuple[int, ...], device: str) -> None:
    """Sums around it would cost digits, which all values lose alike: they are taken around the mean of what counts in
    the first quarter."""
    mask = torch.rand(shape[0], *shape[2:], device=device) > 0.3
    mask.view(-1)[0] = True
    x = torch.full(shape, 0.1, device=device)
    x.movedim(1, -1)[(0,) * (len(shape) - 1)] = 1000.3
    x = torch.where(mask.unsqueeze(1), x, -1e30)
    _, found = cut_out(x.double(), mask)
    counts, mean, m2 = stats(x, None, mask)
    torch.testing.assert_close(mean, found["mean"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(m2 / counts, found["var"][0], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------- other ways to the same


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("set_size", [None, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_stages_compose(weighted: bool, set_size: int | None, activation: Any, device: str) -> None:
    """To the bits of the operator, for one set; numbers it divides by the largest."""
    shape = (8, 20, 9, 7)
    x, dy, residual, weight, bias = tensors(shape, contiguous, torch.float32, device)
    mask = mask_of(shape, "weights" if weighted else "bool", device)
    x = poisoned(x, mask)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    y = OPS.batch_norm(*leaves[:3], None, None, None, True, 0.1, 1e-5, residual, activation, None, set_size, mask)
    expected = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    x, weight, bias, residual = (t.detach() for t in leaves)
    moments = stats(x, set_size, mask)
    if set_size is None:
        assert moments.counts == mask.clamp(min=0).to(torch.float32).double().sum() or weighted
        statistics = merge_stats(moments)
    else:
        statistics = moments.each()
    chain = Chain(residual, activation)
    of_channels = weight, bias
    output, _ = elemt(x, statistics, *of_channels, chain, set_size, mask)
    sums = backward_reduce(dy, x, statistics, *of_channels, chain, set_size, mask)
    dx, dresidual = backward_elemt(dy, x, statistics, sums, *of_channels, chain, set_size, mask)
    found = [output, dx, *(g.float() for g in sums.gradients(statistics)), dresidual]
    for one, other in zip(found, expected, strict=True):
        same = set_size is None and not weighted
        assert torch.equal(one, other) if same else torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("set_size", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_derivatives_of_every_kind(weighted: bool, set_size: int | None, device: str) -> None:
    """Backward, twice, in forward mode and under functorch."""
    shape = (4, 3, 6)
    mask = mask_of(shape, "weights" if weighted else "bool", device)
    mask[:, :2] = 1
    x, _, residual, weight, bias = tensors(shape, contiguous, torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        norm = x, weight, bias, None, None, None, True, 0.1, 1e-5, residual, "silu", None, set_size
        return OPS.batch_norm(*norm, mask)

    torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, leaves)
    dy = torch.randn_like(x)  # not 0 where nothing counts
    once, again = (torch.autograd.grad(call(*leaves), leaves, dy, create_graph=graph) for graph in (False, True))
    for one, other in zip(once, again, strict=True):
        torch.testing.assert_close(one, other)
    by_kernels = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    leaves = [t.detach() for t in leaves]
    by_functorch = torch.func.grad(lambda *args: call(*args).square().sum(), argnums=(0, 1, 2, 3))(*leaves)
    for one, other in zip(by_functorch, by_kernels, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("set_size", [None, 4])
def test_running_statistics_by_primitives(set_size: int | None, device: str) -> None:
    """Move as those of kernels do, by weights too."""
    x = torch.randn(8, 3, 6, dtype=torch.float64, device=device)
    mask = mask_of((8, 3, 6), "weights", device)
    found = []
    for transformed in (False, True):
        running = torch.zeros(3, dtype=x.dtype, device=device), torch.ones(3, dtype=x.dtype, device=device)
        with forward_ad.dual_level():
            given = forward_ad.make_dual(x, x) if transformed else x
            OPS.batch_norm(given, None, None, *running, None, True, 0.5, 1e-5, set_size=set_size, mask=mask)
        found.append(running)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


def test_mapped_over_masks(device: str) -> None:
    x, masks = torch.randn(5, 3, 6, device=device), torch.rand(4, 5, 6, device=device) > 0.4
    mapped = torch.func.vmap(lambda mask: plain(x, mask))(masks)
    for one, mask in zip(mapped, masks, strict=True):
        torch.testing.assert_close(one, plain(x, mask), atol=2e-6, rtol=0)


def test_a_residual_of_other_sizes(device: str) -> None:
    """Is added by torch, and does not reach what does not count."""
    x, mask = torch.randn(4, 3, 5, device=device), torch.rand(4, 5, device=device) > 0.5
    residual = torch.randn(3, 1, device=device)
    y = plain(x, mask, residual=residual, activation="sigmoid")
    torch.testing.assert_close(y, plain(x, mask, residual=residual.expand_as(x).contiguous(), activation="sigmoid"))
    assert not y[~mask.unsqueeze(1).expand_as(y)].any()


def test_the_same_bits_for_any_number_of_threads(device: str) -> None:
    x, mask = torch.randn(16, 24, 40, 40, device=device), torch.rand(16, 40, 40, device=device) > 0.5
    threads = torch.get_num_threads()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(plain(x, mask))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], one) for one in results)


def test_values_that_all_count_are_as_without_a_mask(device: str) -> None:
    for shape in ((8, 5, 7), (3, 4, 1100), (64, 70)):
        x = torch.randn(shape, device=device)
        ones = torch.ones(shape[0], *shape[2:], device=device)
        for mask in (ones.bool(), ones, ones.to(torch.bfloat16), ones.int()):
            torch.testing.assert_close(plain(x, mask), bn_ext.functional.batch_norm(x, None, None, training=True))


# ---------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("name", ["BatchNorm1d", "GhostBatchNorm1d"])
def test_lengths(name: str, device: str) -> None:
    bn = getattr(bn_ext.nn, name)(3).to(device)
    x, lengths = torch.randn(5, 3, 9, device=device), torch.tensor([9, 1, 4, 0, 7], device=device)
    mask = torch.arange(9, device=device) < lengths.unsqueeze(1)
    assert torch.equal(bn(x, lengths=lengths), bn(x, mask=mask))
    assert torch.equal(bn(x, lengths=lengths.to(torch.uint16)), bn(x, mask=mask))


def test_virtual_batches(device: str) -> None:
    x, mask = torch.randn(12, 3, 9, device=device), torch.rand(12, 9, device=device) > 0.4
    ghost, noisy = (bn_ext.nn.GhostBatchNorm1d(3, 4, noise).to(device) for noise in (False, True))
    for part, of_part, found in zip(x.split(4), mask.split(4), ghost(x, mask=mask).split(4), strict=True):
        torch.testing.assert_close(found, plain(part, of_part))
    rows = []
    for _ in range(300):
        y = noisy(x, mask=mask)
        assert not y[~mask.unsqueeze(1).expand_as(y)].any()
        rows.append(y.sum((0, 2)) / mask.sum())
    wide = noisy(x, mask=mask * 1e-6)  # weights of another size are no other noise
    assert (wide - plain(x, mask)).abs().max() < 4
    noise = torch.stack(rows).var(0) * mask.sum() / 12 / (1 / 4 - 1 / 12)  # 1, were there no second noise
    assert (noise > 0.7).all()
    assert (noise < 1.4).all()


def test_transposed_rows(device: str) -> None:
    x, mask = torch.randn(4, 9, 3, device=device), torch.rand(4, 9, device=device) > 0.4
    torch.testing.assert_close(plain(x.mT, mask), plain(x.mT.contiguous(), mask))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_scripted_and_copied(training: bool, device: str) -> None:
    bn = bn_ext.BatchNorm1d(3).to(device).train(training)
    x, mask = torch.randn(4, 3, 6, device=device), torch.rand(4, 6, device=device) > 0.4
    expected = bn(x, activation="silu", mask=mask)
    compiled = torch.compile(bn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, activation="silu", mask=mask), expected)
    assert torch.equal(torch.jit.script(bn)(x, None, "silu", None, mask), expected)


def test_exported_in_evaluation_alone() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = bn_ext.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, activation="sigmoid", mask=mask)

    x, mask = torch.randn(4, 3, 6), torch.rand(4, 6) > 0.4
    model = Masked().eval()
    torch.testing.assert_close(torch.export.export(model, (x, mask)).module()(x, mask), model(x, mask))
    with pytest.raises(RuntimeError, match="not exported in training"):
        torch.export.export(model.train(), (x, mask))


def test_nothing_is_fused_behind_a_mask() -> None:
    """What follows is not 0 behind the mask; fused, it would be."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = bn_ext.BatchNorm1d(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.sigmoid(self.bn(x, mask=mask))

    x, mask = torch.randn(4, 3, 6), torch.rand(4, 6) > 0.4
    model = Masked()
    expected = model(x, mask)
    fused = bn_ext.fuse(model, x, mask)
    assert torch.equal(fused(x, mask), expected)
    assert "has a mask" in str(bn_ext.graph.fusions(fused))


def test_made_again_from_a_masked_input(device: str) -> None:
    """Outputs that are made again, and checkpoints, have the bits of those that were kept."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv1d(3, 8, 3, padding=1), bn_ext.BatchNorm1d(8), nn.Conv1d(8, 2, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.last(self.bn(self.conv(x), activation="relu", mask=mask))

    net, x, mask = Net().to(device), torch.randn(4, 3, 20, device=device), torch.rand(4, 20, device=device) > 0.4

    def gradients(run: Any) -> list[Tensor]:
        net.zero_grad()
        run(x, mask).square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]

    def checkpointed(*args: Any) -> Tensor:
        contexts = bn_ext.checkpoint_contexts
        return torch.utils.checkpoint.checkpoint(net, *args, use_reentrant=False, context_fn=contexts)

    expected = gradients(net)
    assert all(map(torch.equal, gradients(checkpointed), expected))
    bn_ext.train.recompute_outputs(net)
    assert all(map(torch.equal, gradients(net), expected))


def test_what_is_behind_a_mask_reaches_no_derivative(device: str) -> None:
    """NaN in the residual or in dy, also where torch adds the residual, and in second derivatives."""
    x, residual, dy = torch.randn(3, 4, 3, 6, dtype=torch.float64, device=device)
    mask = torch.rand(4, 6, device=device) > 0.4
    weight, bias = torch.randn(2, 3, dtype=torch.float64, device=device)
    for spoilt in (residual, residual[:, :1]):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, poisoned(spoilt, mask))]
        for training in (True, False):
            running = torch.zeros(3, dtype=x.dtype, device=device), torch.ones(3, dtype=x.dtype, device=device)
            norm = *leaves[:3], *running, None, training, 0.0, 1e-5
            y = OPS.batch_norm(*norm, leaves[3], "gelu", None, None, mask)
            first = torch.autograd.grad(y, leaves, poisoned(dy, mask), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            assert all(g.isfinite().all() for g in (*first, *second))


def test_weights_of_any_size(device: str) -> None:
    """The results are those of weights of ordinary size."""
    x, weights = torch.randn(4, 3, 6, device=device), torch.rand(4, 6, dtype=torch.float64, device=device)
    expected = torch.zeros(3, device=device), torch.ones(3, device=device)
    norm = None, None, *expected, None, True, 0.1, 1e-5
    y = OPS.batch_norm(x, *norm, mask=weights)
    for scale in (1e-300, 1e-40, 1e-8, 1e30, 1e200):
        leaf, running = x.clone().requires_grad_(), (torch.zeros(3, device=device), torch.ones(3, device=device))
        again = OPS.batch_norm(leaf, None, None, *running, None, True, 0.1, 1e-5, mask=weights * scale)
        torch.testing.assert_close(again, y)
        torch.testing.assert_close(running, expected)
        assert torch.autograd.grad(again, leaf, 65536 * torch.randn_like(x))[0].isfinite().all()


def test_an_empty_batch_counts_as_little_as_one_value(device: str) -> None:
    bn, x, mask = bn_ext.BatchNorm1d(3).to(device), torch.randn(0, 3, 6, device=device), torch.ones(0, 6, device=device)
    for residual in (None, torch.ones(1, device=device)):
        assert bn(x, residual, mask=mask).shape == x.shape
    assert bn.num_batches_tracked == 0


def test_recalibrated_by_what_counts(device: str) -> None:
    x, mask = torch.randn(8, 3, 6, device=device), torch.rand(8, 6, device=device) > 0.4
    for make in (lambda: bn_ext.BatchNorm1d(3), lambda: bn_ext.nn.GhostBatchNorm1d(3, 4)):
        model = make().to(device)
        x = x.masked_fill(~mask.unsqueeze(1), 1e6)
        bn_ext.train.recalibrate(model, [x], forward=lambda m, batch: m(batch, mask=mask))
        values = x.movedim(1, -1)[mask]
        torch.testing.assert_close(model.running_mean, values.mean(0))
        torch.testing.assert_close(model.running_var, values.var(0))


def test_folded(device: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(3, 4, 1), bn_ext.BatchNorm1d(4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(self.conv(x), activation="sigmoid", mask=mask)

    net, x, mask = Net().to(device).eval(), torch.randn(4, 3, 6, device=device), torch.rand(4, 6, device=device) > 0.4
    net.bn.running_mean.normal_()
    torch.testing.assert_close(bn_ext.fold(net, x, mask)(x, mask), net(x, mask))


def test_lazy_and_nested(device: str) -> None:
    model = bn_ext.convert(nn.Sequential(nn.LazyBatchNorm1d())).to(device)
    x, mask = torch.randn(4, 3, 6, device=device), torch.rand(4, 6, device=device) > 0.4
    torch.testing.assert_close(model[0](x, mask=mask), plain(x, mask))
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(3, 5)], device=device)
    with pytest.raises(NotImplementedError, match="nested tensors have no batch norm"):
        model[0](nested, lengths=torch.tensor([4, 5], device=device))


def test_opcheck(device: str) -> None:
    for weighted in (False, True):
        shape = (4, 3, 6)
        weights = mask_of(shape, "weights" if weighted else "bool", device).float().clamp(min=0)
        x, dy, residual, weight, bias = tensors(shape, contiguous, torch.float32, device)
        silu = bn_ext.activation.NAMES.index("silu")
        statistics = OPS.batch_norm_stats(x, None, weights)
        norm = x, weight, bias, torch.zeros(3, device=device), torch.ones(3, device=device), None, 0.1, 1e-5
        calls = {
            OPS.batch_norm_stats.default: (x, None, weights),
            OPS.batch_norm_forward.default: (*norm, residual, silu, 0.0, None, False, weights),
            OPS.batch_norm_elemt.default: (x, weight, bias, *statistics[1:], residual, silu, 0.0, None, False, weights),
            OPS.batch_norm_backward.default: (
                *(dy, x, weight, bias, *statistics[1:], True, residual, None, silu, 0.0, None),
                *([True] * 4, weights),
            ),
        }
        for op, arguments in calls.items():
            torch.library.opcheck(op, arguments)
