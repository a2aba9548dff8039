"""The CUDA kernels on the model of a GPU: several statistic sets in one launch, and the stages alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import BFLOAT, DOUBLE, FLOAT, Arguments, Case, Types, channels_last, contiguous
from simt.batch_norm import Device, Kernels, Tail, empty_branches, like
from simt.build import sanitized
from simt.passes import DEVICES, NO_CLUSTERS, WAYS, limits_of
from test_simt_broken import Broken, write_broken
from torch import Tensor

from bn_ext import reference

# Sets of one image, of some images, with a smaller last one; one channel; rows of one channel and of several.
SETS = [
    ((6, 35, 7), contiguous, 1),
    ((5, 35, 7), contiguous, 2),
    ((7, 3, 50, 60), contiguous, 3),
    ((16, 32, 8, 8), contiguous, 4),
    ((9, 33, 5, 7), channels_last, 4),
    ((600, 35), contiguous, 64),
    ((6, 3, 1100), contiguous, 1),
    ((10, 1, 9), contiguous, 4),
    ((8, 1, 9), contiguous, 4),
    ((4, 40, 25, 30), channels_last, 3),
]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value)) if not isinstance(value, Device) else ""


sets = pytest.mark.parametrize(("shape", "layout", "set_size"), SETS, ids=named)
devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels()


def forward_and_backward(kernels: Kernels, device: Device, a: Arguments, set_size: int | None, **kept: Tensor) -> dict:
    """All results of the fused kernels, the counter beginning with 3 batches of a cumulative average."""
    tail = Tail(a.activation or "identity", a.param, a.residual, kept.get("branches"))
    running = a.running_mean.clone(), a.running_var.clone()
    batches = torch.tensor(3)
    y, mean, invstd = kernels.forward(
        device, a.input, *running, a.weight, a.bias, True, None, batches=batches, tail=tail, set_size=set_size
    )
    if "branches" in kept:
        tail = tail._replace(residual=None)
    inputs = a.dy, a.input, a.weight, a.bias, mean, invstd
    wanted = True, True, True, a.residual is not None
    gradients = kernels.backward(device, *inputs, wanted=wanted, tail=tail, set_size=set_size)
    names = "y", "mean", "invstd", "running_mean", "running_var", "batches", "dx", "dweight", "dbias", "dresidual"
    return dict(zip(names, (y, mean, invstd, *running, batches, *gradients), strict=True))


def one_by_one(kernels: Kernels, device: Device, a: Arguments, set_size: int) -> dict:
    """Results of a call for each set, joined; the gradients of weight and bias added up."""
    parts = []
    for i in range(0, a.input.size(0), set_size):

        def part(t: Tensor | None, i: int = i) -> Tensor | None:
            return None if t is None else t[i : i + set_size].clone()

        one = replace(a, input=part(a.input), dy=part(a.dy), residual=part(a.residual))
        parts.append(forward_and_backward(kernels, device, one, None))
    joined = {name: torch.cat([p[name] for p in parts]) for name in ("y", "dx")}
    joined |= {name: torch.stack([p[name] for p in parts]) for name in ("mean", "invstd")}
    joined |= {name: sum(p[name].double() for p in parts) for name in ("dweight", "dbias")}
    joined["dresidual"] = None if a.residual is None else torch.cat([p["dresidual"] for p in parts])
    return joined


def pooled(a: Arguments, set_size: int) -> tuple[Tensor, Tensor]:
    """The running statistics after a batch that is the fourth of a cumulative average."""
    x = a.input.double()
    var = reference.pooled_variance(x, set_size)
    mean = reference.statistics(x)[0]
    return a.running_mean.double().lerp(mean, 0.25), a.running_var.double().lerp(var, 0.25)


@devices
@sets
@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
def test_sets_are_normalized_by_themselves(shape, layout, set_size, types: Types, device: Device, kernels) -> None:
    torch.manual_seed(0)
    a = Case(shape, layout, types, residual=True, activation="relu").arguments("cpu")
    kernels.configure()
    together = forward_and_backward(kernels, device, a, set_size, branches=empty_branches(a.input))
    assert kernels.launches() == 2
    apart = one_by_one(kernels, device, a, set_size)
    ulps = 4 * torch.finfo(types.input).eps
    for name in ("y", "dx", "dresidual", "dweight", "dbias"):
        scale = max(1.0, apart[name].abs().max().item())
        torch.testing.assert_close(together[name].double(), apart[name].double(), rtol=ulps, atol=ulps * scale)
    for name in ("mean", "invstd"):
        torch.testing.assert_close(together[name], apart[name], rtol=1e-7, atol=1e-7)
    assert together["batches"] == 4
    for name, expected in zip(("running_mean", "running_var"), pooled(a, set_size), strict=True):
        assert torch.allclose(together[name].double(), expected, rtol=1e-5, atol=1e-5), name


@sets
@devices
def test_order_of_threads_changes_nothing(shape, layout, set_size, device: Device, kernels: Kernels) -> None:
    results = []
    for seed in range(3):
        kernels.configure(seed, preempt=20 * (seed % 2))
        torch.manual_seed(0)
        a = Case(shape, layout).arguments("cpu")
        results.append(forward_and_backward(kernels, device, a, set_size))
    kernels.configure()
    for name, first in results[0].items():
        assert first is None or all(torch.equal(first, other[name]) for other in results[1:]), name


def under_sanitizer(case: Case, set_size: int, limits: tuple[int, ...]) -> tuple[dict, dict]:
    """In the process of the sanitized tests: the fused kernels, and the stages."""
    torch.manual_seed(0)
    a, kernels, device = case.arguments("cpu"), Kernels(sanitize=True), Device(*limits)
    return forward_and_backward(kernels, device, a, set_size), composed(kernels, device, a, set_size)


@sets
def test_nothing_is_read_or_written_out_of_bounds(shape, layout, set_size, kernels: Kernels) -> None:
    case = Case(shape, layout, residual=True, activation="silu")
    torch.manual_seed(0)
    plain = forward_and_backward(kernels, NO_CLUSTERS, case.arguments("cpu"), set_size)
    results = sanitized().submit(under_sanitizer, case, set_size, limits_of(NO_CLUSTERS)).result()
    for name, one in results[0].items():
        assert one is None or torch.equal(one, plain[name]), name


def composed(kernels: Kernels, device: Device, a: Arguments, set_size: int | None) -> dict:
    """The results of the five stages, one after the other."""
    tail = Tail(a.activation or "identity", a.param, a.residual)
    counts, mean, m2 = kernels.stats(device, a.input, set_size)
    assert counts.tolist() == [p.numel() / p.size(1) for p in a.input.split(set_size or a.input.size(0))]
    running = a.running_mean.clone(), a.running_var.clone()
    _, merged_mean, merged_invstd = kernels.merge_stats(counts, mean, m2, *running, eps=a.eps)
    invstd = merged_invstd
    if set_size is None:
        assert torch.equal(merged_mean, mean)
    else:
        invstd = 1 / (m2 / counts.unsqueeze(1) + a.eps).sqrt()
    y = kernels.elemt(device, a.input, a.weight, a.bias, mean, invstd, set_size, tail)
    inputs = a.dy, a.input, a.weight, a.bias, mean, invstd
    sums = torch.full((2, *mean.shape), torch.nan, dtype=torch.float64)
    kernels.backward_stage(device, inputs, sums, set_size=set_size, tail=tail)
    dx, dresidual = like(a.input), None if a.residual is None else like(a.input)
    kernels.backward_stage(device, inputs, sums, counts, (dx, dresidual), set_size, tail)
    named = {"y": y, "mean": mean, "invstd": invstd, "dx": dx, "dresidual": dresidual}
    return named if set_size is not None else named | dict(zip(("running_mean", "running_var"), running, strict=True))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("types", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout", "set_size", "device"),
    [*((shape, layout, None, device) for shape, layout, device in WAYS), *((*way, NO_CLUSTERS) for way in SETS)],
    ids=named,
)
def test_stages_compose_to_the_fused_kernels(shape, layout, set_size, device, types, activation, kernels) -> None:
    torch.manual_seed(0)
    a = Case(shape, layout, types, residual=activation is not None, activation=activation).arguments("cpu")
    fused = forward_and_backward(kernels, device, a, set_size)
    of_stages = composed(kernels, device, a, set_size)
    ulp = torch.finfo(types.input).eps
    for name, one in of_stages.items():
        if one is None or name.startswith("running"):
            continue
        eps = 1e-7 if one.dtype == torch.float64 else ulp
        scale = fused[name].abs().max().item()
        torch.testing.assert_close(one, fused[name], rtol=0, atol=eps * scale, msg=lambda m, n=name: f"{n}: {m}")


BROKEN = [
    Broken("merged too early", "kernel/kernel.h", "<unsigned>(g_.sets)", "<unsigned>(g_.sets - 1)", "running", 0),
    Broken("arrivals not set to zero", "kernel/kernel.h", "if (pass.finishes_sets())", "if (false)", "running", 0),
    Broken("rows of the next set", "kernel/slab.h", "set() * g.rows + row;", "row;", "y", 0),
]


@pytest.mark.parametrize("broken", BROKEN, ids=[b.name for b in BROKEN])
def test_what_is_broken_of_sets_differs(broken: Broken, tmp_path: Path, kernels: Kernels) -> None:
    write_broken(broken, tmp_path, "Identity{}")
    wrong = Kernels("broken", include=[tmp_path], changed=[broken.of])
    a = Case((7, 3, 40), contiguous).arguments("cpu")
    right, other = (forward_and_backward(k, NO_CLUSTERS, a, 3) for k in (kernels, wrong))
    differ = [name for name, one in right.items() if one is not None and not torch.equal(one, other[name])]
    assert any(name.startswith(broken.error) for name in differ), differ


def test_merging_of_rows(kernels: Kernels) -> None:
    """More channels than a block has threads, rows without values, one row alone; in their order."""
    torch.manual_seed(0)
    parts = [torch.randn(n, 300, dtype=torch.float64) + 3 for n in (5, 0, 1, 7)]
    counts = torch.tensor([len(p) for p in parts], dtype=torch.float64)
    means = torch.stack([p.mean(0).nan_to_num() for p in parts])
    m2s = torch.stack([(p - p.mean(0)).square().sum(0) for p in parts])
    x = torch.cat(parts)
    running, batches = [torch.zeros(300), torch.ones(300)], torch.tensor(4)
    count, mean, invstd = kernels.merge_stats(counts, means, m2s, *running, batches)
    assert count == 13
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(invstd, (x.var(0, correction=0) + 1e-5).rsqrt())
    torch.testing.assert_close(running[0].double(), x.mean(0) / 4, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].double(), 0.75 + x.var(0) / 4, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [0, 1])
def test_rows_of_at_most_one_value_leave_the_running_statistics(values: int, kernels: Kernels) -> None:
    counts = torch.tensor([0.0, values]).double()
    means, m2s = torch.tensor([[7.0], [values * 5.0]]).double(), torch.zeros(2, 1).double()
    running = torch.full((1,), 2.0), torch.full((1,), 3.0)
    count, mean, invstd = kernels.merge_stats(counts, means, m2s, *running, eps=0.25)
    assert (count, mean, invstd) == (values, values * 5, 2)
    assert running == (2, 3)
