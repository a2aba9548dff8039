"""Batch norm with statistics for each of several domains."""

from __future__ import annotations

import copy

import numpy as np
import other_sets
import pytest
import torch
from cases import channels_last, contiguous, same_format
from other_sets import assert_follows, calls, normalized, randomized, spread, tails
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext.nn import DomainBatchNorm1d, DomainBatchNorm2d, DomainBatchNorm3d

SHAPES = [
    (DomainBatchNorm1d, (9, 6)),
    (DomainBatchNorm1d, (9, 6, 7)),
    (DomainBatchNorm2d, (9, 6, 5, 7)),
    (DomainBatchNorm3d, (9, 6, 2, 3, 4)),
]
DOMAIN = [0, 2, 0, 4, 2, 0, 2, 2, 0]  # of 5: none of 1 and 3, one of 4
U16 = torch.uint16


def domains(device: str = "cpu") -> Tensor:
    return torch.tensor(DOMAIN, device=device)


def by_domain(module: nn.Module, x: Tensor, domain: Tensor) -> Tensor:
    """A loop over the domains."""
    others = [0, *range(2, x.dim())]
    z = torch.zeros_like(x)
    for d in range(module.num_domains):
        mine = (domain == d).nonzero()[:, 0]
        part = x.index_select(0, mine)
        if len(mine) == 0:
            continue
        if module.training or module.running_mean is None:
            part = normalized(part, others)
        else:
            part = (part - spread(module.running_mean[d], x)) * spread(module.running_var[d] + 1e-5, x).rsqrt()
        if module.weight is not None:
            weight, bias = (p[d] if module.affine_per_domain else p for p in (module.weight, module.bias))
            part = part * spread(weight, x) + spread(bias, x)
        z = z.index_put((mine,), part)
    return z


@calls
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine_per_domain", [True, False])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("cls", "shape"), SHAPES, ids=str)
def test_values_and_gradients(
    cls, shape, layout, affine_per_domain, training, dtype, residual, activation, device: str
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    module = randomized(cls(6, 5, affine_per_domain, device=device, dtype=wide)).train(training)
    x = layout((torch.randn(shape, device=device) + 1).to(dtype))
    assert_follows(by_domain, module, x, domains(device), residual=residual, activation=activation)
    assert x.dim() == 3 or same_format(module(x, domains(device)), x)


@tails
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine_per_domain", [True, False])
def test_a_number(affine_per_domain: bool, training: bool, residual: bool, activation, device: str) -> None:
    """Is a plain batch norm of the domain's rows, in one operator, and the same as an index for each sample."""
    module = randomized(DomainBatchNorm2d(6, 5, affine_per_domain, device=device, dtype=torch.float64)).train(training)
    x = torch.randn(9, 6, 5, 7, device=device, dtype=torch.float64)

    def formula(module: nn.Module, x: Tensor, domain: int) -> Tensor:
        return by_domain(module, x, torch.full((9,), domain, device=device))

    assert_follows(formula, module, x, 3, residual=residual, activation=activation)
    states = []
    for domain in (3, torch.full((9,), 3, device=device)):
        one = copy.deepcopy(module)
        one(x, domain)
        states.append(one.state_dict())
    torch.testing.assert_close(*states, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(module(x, np.int64(3)), module(x, torch.tensor(3, device=device).to(U16)))
    with torch.profiler.profile() as profile:
        module(x, 3)
    assert sum(event.count for event in profile.key_averages() if event.key.startswith("bn_ext::batch_norm_")) == 1


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None, device: str) -> None:
    """Each domain's as those of a plain batch norm that gets its samples alone. Those of no or one sample of one value
    stay."""
    module = DomainBatchNorm2d(6, 5, momentum=momentum, device=device, dtype=torch.float64)
    plain = [nn.BatchNorm2d(6, momentum=momentum, device=device, dtype=torch.float64) for _ in range(5)]
    for k in range(3):
        x = torch.randn(9, 6, 5, 7, device=device, dtype=torch.float64) * (k + 1) + k
        domain = domains(device).roll(k) if k < 2 else domains(device).clamp(max=2)
        module(x, domain)
        for d in domain.unique().tolist():
            plain[d](x[domain == d])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        expected = torch.stack([getattr(bn, name) for bn in plain])
        torch.testing.assert_close(getattr(module, name), expected, rtol=1e-13, atol=1e-13)
    assert module.num_batches_tracked.tolist() == [3, 0, 3, 0, 2]


def test_one_value(device: str) -> None:
    """A domain of one value: the output is the bias, and nothing of it moves."""
    module = randomized(DomainBatchNorm1d(6, 5, True, device=device))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(9, 6, device=device, requires_grad=True)
    y = module(x, domains(device))
    torch.testing.assert_close(y[3], module.bias[4])
    assert not torch.autograd.grad(y.square().sum(), x)[0][3].any()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        moved = (module.state_dict()[name] != before[name]).view(5, -1).any(1)
        assert moved.tolist() == [True, False, True, False, False], name


def test_nan_stays_in_its_domain(device: str) -> None:
    module = randomized(DomainBatchNorm2d(6, 5, True, device=device))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(9, 6, 5, 7, device=device)
    spoiled = x.clone()
    spoiled[1] = float("nan")
    spoiled[4] = float("inf")
    results = []
    for one in (x, spoiled):
        module.load_state_dict(before)
        results.append(other_sets.results(lambda x, d, _: module(x, d), module, one, None, domains(device)))
        results[-1] |= {name: module.state_dict()[name] for name in ("running_mean", "running_var")}
    for name, clean in results[0].items():
        others = [0, 2, 3, 5, 8] if name in ("output", "dx") else [0, 1, 3, 4]
        assert torch.equal(results[1][name][others], clean[others]), name


def test_a_large_mean(device: str) -> None:
    x = torch.randn(9, 6, 5, 7, dtype=torch.float64) + 1e5 * (1 + domains().view(-1, 1, 1, 1))
    exact = by_domain(DomainBatchNorm2d(6, 5, affine=False), x.float().double(), domains())
    module = DomainBatchNorm2d(6, 5, affine=False, device=device)
    y = module(x.float().to(device), domains(device))
    torch.testing.assert_close(y.cpu(), exact.float(), rtol=0, atol=1e-5)


def test_without_running_statistics(device: str) -> None:
    module = DomainBatchNorm2d(6, 5, track_running_stats=False, device=device, dtype=torch.float64)
    x = torch.randn(9, 6, 5, 7, device=device, dtype=torch.float64)
    for training in (True, False):
        assert_follows(by_domain, module.train(training), x, domains(device))
        torch.testing.assert_close(module(x, 1), module(x, torch.ones_like(domains(device))))


def test_evaluation_keeps_its_statistics(device: str) -> None:
    """Training leaves the graph of an earlier evaluation alone."""
    module = randomized(DomainBatchNorm2d(6, 5, device=device, dtype=torch.float64)).eval()
    x = torch.randn(9, 6, 5, 7, device=device, dtype=torch.float64, requires_grad=True)
    gradients = []
    for _ in range(2):
        y = module.eval()(x, domains(device))
        if gradients:
            module.train()(x, domains(device))
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*gradients)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """What timm's does: equal parts of the batch, the first by itself, each other by a batch norm of its own; then what
    stood behind a batch norm with activation."""

    def __init__(self, num_features: int, num_splits: int = 2) -> None:
        super().__init__(num_features)
        self.aux_bn = nn.ModuleList(nn.BatchNorm2d(num_features) for _ in range(num_splits - 1))
        self.act = nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.act(super().forward(input))
        first, *others = input.chunk(1 + len(self.aux_bn))
        z = torch.cat([super().forward(first), *(bn(part) for bn, part in zip(self.aux_bn, others, strict=True))])
        return self.act(z)


@pytest.mark.parametrize("theirs", [True, False])
def test_from_a_split_batch_norm(theirs: bool, device: str) -> None:
    cls = SplitBatchNorm2d
    if theirs:
        cls = pytest.importorskip("timm.layers", reason="no timm to make a batch norm of").SplitBatchNorm2d
    split = randomized(cls(6, num_splits=3)).to(device)
    for bn in split.aux_bn:
        bn.running_var.uniform_(0.5, 2)
    module = DomainBatchNorm2d.from_batch_norm(split)
    assert module.weight.shape == module.running_mean.shape == (3, 6)
    domain = torch.arange(3, device=device).repeat_interleave(3)
    x = torch.randn(9, 6, 5, 7, device=device)
    torch.testing.assert_close(module(x, domain), split(x))
    torch.testing.assert_close(module.eval()(x, 0), split.eval()(x))
    torch.testing.assert_close(module.running_mean[1], split.aux_bn[0].running_mean)
    with pytest.raises(ValueError, match="2 domains for a batch norm of 3 splits"):
        DomainBatchNorm2d.from_batch_norm(split, 2)
    split.act = nn.ReLU()
    with pytest.raises(ValueError, match="got SplitBatchNorm2d with ReLU behind it, as its act: replace that by"):
        DomainBatchNorm2d.from_batch_norm(split)
    split.act = nn.Identity()
    for bn in split.aux_bn:
        bn_ext.train.freeze(bn)
    with pytest.raises(ValueError, match="some of the splits are frozen, some not"):
        DomainBatchNorm2d.from_batch_norm(split)


@pytest.mark.parametrize("affine_per_domain", [True, False])
def test_from_a_plain_batch_norm(affine_per_domain: bool, device: str) -> None:
    plain = randomized(nn.BatchNorm2d(6, eps=1e-3, momentum=None, device=device, dtype=torch.float64)).eval()
    plain.bias.requires_grad_(False)
    module = DomainBatchNorm2d.from_batch_norm(plain, 4, affine_per_domain)
    assert (module.eps, module.momentum, module.training, module.num_domains) == (1e-3, None, False, 4)
    assert (module.weight.requires_grad, module.bias.requires_grad) == (True, False)
    x = torch.randn(9, 6, 5, 7, device=device, dtype=torch.float64)
    for domain in (0, 3, torch.arange(9, device=device) % 4):
        torch.testing.assert_close(module(x, domain), plain(x))
    before = copy.deepcopy(plain.state_dict())
    module.train()(x, 2)
    module.weight.data.fill_(3)
    assert other_sets.same(plain.state_dict(), before)
    bare = nn.BatchNorm2d(6, affine=False, track_running_stats=False)
    assert not DomainBatchNorm2d.from_batch_norm(bare, 4).state_dict()
    with pytest.raises(TypeError, match="give the number of domains, num_domains"):
        DomainBatchNorm2d.from_batch_norm(plain)
    with pytest.raises(TypeError, match="expected a batch norm of torch, got Linear"):
        DomainBatchNorm2d.from_batch_norm(nn.Linear(3, 3), 2)
    for wrong, error, message in (
        (2.0, TypeError, "num_domains should be an int, got float"),
        (True, TypeError, "num_domains should be an int, got bool"),
        (-1, ValueError, "num_domains should be positive, got -1"),
    ):
        with pytest.raises(error, match=message):
            DomainBatchNorm2d.from_batch_norm(plain, wrong)
    with pytest.raises(ValueError, match="LazyBatchNorm2d is not initialized"):
        DomainBatchNorm2d.from_batch_norm(nn.LazyBatchNorm2d(), 2)


@pytest.mark.parametrize("affine", [True, False])
def test_from_a_frozen_batch_norm(affine: bool, device: str) -> None:
    """Is frozen, and thaws to what it would have been. Of an adapted one none is made."""
    plain = randomized(bn_ext.BatchNorm2d(6, device=device))
    bn_ext.train.freeze(plain, affine)
    module = DomainBatchNorm2d.from_batch_norm(plain, 3).train()
    x, before = torch.randn(9, 6, 5, 7, device=device), copy.deepcopy(module.state_dict())
    torch.testing.assert_close(module(x, 1), plain(x))
    assert other_sets.same(module.state_dict(), before)
    assert module.weight.requires_grad != affine
    bn_ext.train.unfreeze(module)
    assert module.training
    assert module.weight.requires_grad
    module(x, 1)
    assert module.num_batches_tracked[1] == before["num_batches_tracked"][1] + 1
    bn_ext.train.unfreeze(plain)
    bn_ext.train.adapt(plain, 0.5)
    with pytest.raises(ValueError, match=r"domains take no bn_ext.train.adapt: undo it by adapt\(batch_norm, 1\)"):
        DomainBatchNorm2d.from_batch_norm(plain, 3)


@pytest.mark.parametrize("number", [True, False])
def test_around(number: bool) -> None:
    module = randomized(DomainBatchNorm2d(4, 3, affine_per_domain=not number))
    x, indices = torch.randn(5, 4, 3, 3), torch.tensor([0, 2, 0, 0, 2])
    domain = 1 if number else indices
    other_sets.assert_copies(module, x, domain)
    other_sets.assert_deterministic(module, x, domain)
    other_sets.assert_transforms(module, x, domain)
    other_sets.assert_compiles(module, x, domain, activation="relu")
    other_sets.assert_exports(module, x, domain, training=None)
    other_sets.assert_refuses(module, x, domain)
    with pytest.raises(RuntimeError, match="TorchScript has no form of DomainBatchNorm2d: use"):
        torch.jit.script(nn.Sequential(module))
    if number:
        return
    traced = torch.jit.trace(copy.deepcopy(module), (x, domain), check_trace=False)
    module(x, domain)
    for some in (x + 1, x[:3] + 2):  # of any size
        torch.testing.assert_close(traced(some, indices[: len(some)]), module(some, indices[: len(some)]))
    torch.testing.assert_close(traced.state_dict(), module.state_dict())


@torch.no_grad()
def test_numbers_compiled_by_inductor() -> None:
    """Rows are read and written as their own, also once Dynamo takes the number for a variable."""
    torch._dynamo.reset()
    module = randomized(DomainBatchNorm2d(4, 3, True))
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True)
    x = torch.randn(5, 4, 3, 3)
    for domain in (2, 1):
        assert torch.equal(compiled(x, domain), module(x, domain))
        torch.testing.assert_close(compiled.state_dict(), module.state_dict(), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("domain", [1, torch.tensor([0, 2, 0, 2])], ids=["number", "indices"])
def test_gradcheck(domain: int | Tensor, training: bool) -> None:
    module = randomized(DomainBatchNorm2d(2, 3, True, dtype=torch.float64)).train(training)
    other_sets.assert_gradcheck(module, torch.randn(4, 2, 2, 1), domain, activation="silu")


def test_autocast_and_frozen(device: str) -> None:
    module = randomized(DomainBatchNorm2d(6, 5, device=device))
    x = torch.randn(9, 6, 5, 7, device=device)
    for domain in (1, domains(device)):
        with torch.autocast(device, torch.bfloat16):
            assert module(x.bfloat16(), domain).dtype == torch.bfloat16
    bn_ext.train.freeze(module)
    before = copy.deepcopy(module.state_dict())
    for domain in (1, domains(device)):
        assert torch.equal(module.train()(x, domain), copy.deepcopy(module).eval()(x, domain))
    assert other_sets.same(module.state_dict(), before)


def test_construction() -> None:
    module = DomainBatchNorm2d(6, 3, eps=1e-3, momentum=None, affine=False, dtype=torch.float64)
    assert (module.eps, module.momentum, module.weight) == (1e-3, None, None)
    assert module.running_mean.shape == module.running_var.shape == (3, 6)
    assert module.num_batches_tracked.shape == (3,)
    assert not isinstance(module, nn.BatchNorm2d)
    assert "num_domains=3, affine_per_domain=False, bn_ext)" in repr(module)
    module = randomized(DomainBatchNorm2d(6, 3, True))
    module.reset_parameters()
    assert other_sets.same(module.state_dict(), DomainBatchNorm2d(6, 3, True).state_dict())
    with pytest.raises(ValueError, match="num_domains should be positive, got 0"):
        DomainBatchNorm2d(6, 0)
    with pytest.raises(TypeError, match="num_domains should be an int, got float"):
        DomainBatchNorm2d(6, 1e-5)
    with pytest.raises(TypeError, match="affine_per_domain should be a bool, got float"):
        DomainBatchNorm2d(6, 3, 1e-5)


def test_mistakes(device: str) -> None:
    module = randomized(DomainBatchNorm1d(4, 3, device=device))
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 4, device=device)

    def indices(*values: float) -> Tensor:
        return torch.tensor(values, device=device)

    for domain, error, message in (
        (3, IndexError, "domain should be from 0 to 2, got 3"),
        (-1, IndexError, "domain should be from 0 to 2, got -1"),
        (indices(0.0, 1.0), TypeError, "domain should be of an integer type, got torch.float32"),
        (indices(0, 1, 1), ValueError, r"one index a sample, \(2,\), got \(3,\)"),
        (indices(False, True), TypeError, "domain should be of an integer type, got torch.bool"),
        ("0", TypeError, "domain should be an int or a tensor, got str"),
        (None, TypeError, "domain should be an int or a tensor, got NoneType"),
        (True, TypeError, "domain should be an int or a tensor, got bool"),
        (np.array([0, 1]), TypeError, "domain should be an int or a tensor, got ndarray"),
    ):
        with pytest.raises(error, match=message):
            module(x, domain)
        if not isinstance(domain, Tensor) or domain.dtype != torch.int64:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, pytest.raises(error, match=message):
                module(torch.empty(2, 4), fake.from_tensor(domain) if isinstance(domain, Tensor) else domain)
    if device == "cpu":
        for wrong, message in ((indices(0, 3), "got 3"), (indices(-1, 0), "got -1"), (indices(0, 9).to(U16), "got 9")):
            with pytest.raises(IndexError, match=f"domain should be from 0 to 2, {message}"):
                module(x, wrong)
    with pytest.raises(TypeError):
        module(x)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        module(torch.randn(2, 4, 3, 3, device=device), 0)
    for domain in (0, indices(0, 1)):
        for training in (True, False):
            with pytest.raises(RuntimeError, match="running_mean should contain 6 elements not 4"):
                module.train(training)(torch.randn(2, 6, device=device), domain)
        module.train()
        with pytest.raises(ValueError, match="activation should be"):
            module(x, domain, activation="rule")
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(x[:1], 0)
    assert other_sets.same(module.state_dict(), before)


def test_values_that_are_not_there() -> None:
    """Fake indices have none to be looked at."""
    with FakeTensorMode():
        assert DomainBatchNorm1d(4, 3)(torch.empty(2, 4), torch.zeros(2, dtype=torch.int64)).shape == (2, 4)


def test_no_values() -> None:
    module = DomainBatchNorm1d(4, 3)
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        for domain in (1, torch.zeros(shape[0], dtype=torch.int64)):
            x = torch.empty(shape, requires_grad=True)
            module(x, domain).sum().backward()
            assert x.grad.shape == shape
    assert torch.equal(module.running_var, torch.ones(3, 4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 1), DomainBatchNorm2d(6, 5)

    def forward(self, x: Tensor, domain: int | Tensor) -> Tensor:
        return self.norm(self.conv(x), domain).relu()


def test_whole_models() -> None:
    """Tools leave the class alone, and say so where they cannot do what they are for."""
    model, x = Model(), torch.randn(9, 3, 4, 4)
    expected = model(x, domains())
    before = copy.deepcopy(model.state_dict())
    for converter in (bn_ext.convert, bn_ext.revert, nn.SyncBatchNorm.convert_sync_batchnorm):
        assert type(converter(model).norm) is DomainBatchNorm2d
    fused = bn_ext.fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(x, domains()), expected)
    torch.testing.assert_close(fused(x, 1), model(x, 1))
    model.load_state_dict(before)
    forward = lambda model, batch: model(batch, domains())  # noqa: E731
    record = bn_ext.train.recalibrate(model, [x], forward=forward, progress=False)
    assert record.rows[0].changed == "left: it has statistics of several domains"
    with bn_ext.train.keep_statistics(model):
        model(x, domains())
        model(x, 1)
    with bn_ext.train.skip_nonfinite(model):
        model(x / 0, domains())
        model(x / 0, 1)
    assert other_sets.same(model.state_dict(), before)
    for domain in (domains(), 1):
        y = checkpoint(model, x, domain, use_reentrant=False, context_fn=bn_ext.checkpoint_contexts)
        after = copy.deepcopy(model.state_dict())
        y.sum().backward()
        assert other_sets.same(model.state_dict(), after)
    model.eval()
    plain = model(x, domains())
    assert "left as it is" in bn_ext.train.adapt(model, 0.0).rows[0].changed
    torch.testing.assert_close(bn_ext.fold(model, x, domains())(x, domains()), plain)
    assert torch.equal(model(x, domains()), plain)
    assert [(row.cls, row.runs_on) for row in bn_ext.report(model).rows] == [("DomainBatchNorm2d", "bn_ext")]


def test_indices_may_change_before_the_backward(device: str) -> None:
    bn = DomainBatchNorm1d(3, 2, affine_per_domain=True).to(device)
    x, domain = torch.randn(6, 3, 4, device=device, requires_grad=True), torch.tensor([0, 1, 1, 0, 1, 0], device=device)
    weights = x, bn.weight, bn.bias
    expected = torch.autograd.grad(bn(x, domain).square().sum(), weights)
    y = bn(x, domain)
    domain.fill_(5)
    for one, other in zip(torch.autograd.grad(y.square().sum(), weights), expected, strict=True):
        torch.testing.assert_close(one, other)
