"""Batch norm whose statistics are shared by groups of channels."""

from __future__ import annotations

import copy

import other_sets
import pytest
import torch
from cases import channels_last, contiguous, same_format
from other_sets import assert_follows, calls, normalized, randomized, spread
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import bn_ext
from bn_ext import activation as activations
from bn_ext.nn import SharedBatchNorm1d, SharedBatchNorm2d, SharedBatchNorm3d

SHAPES = [
    (SharedBatchNorm1d, (10, 6)),
    (SharedBatchNorm1d, (10, 6, 7)),
    (SharedBatchNorm2d, (10, 6, 5, 7)),
    (SharedBatchNorm3d, (9, 6, 2, 3, 4)),
]


def shared(module: nn.Module, x: Tensor) -> Tensor:
    grouped = x.unflatten(1, (module.stat_groups, -1))
    z = normalized(grouped, [d for d in range(grouped.dim()) if d != 1]).flatten(1, 2)
    z = z if module.weight is None else z * spread(module.weight, x)
    return z if module.bias is None else z + spread(module.bias, x)


@calls
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("cls", "shape"), SHAPES, ids=str)
def test_values_and_gradients(cls: type, shape, layout, dtype, residual: bool, activation, device: str) -> None:
    """Means of channels that differ count as variance of their group. A weight of 0 is as any other."""
    wide = torch.promote_types(dtype, torch.float32)
    module = randomized(cls(6, 2, device=device, dtype=wide))
    with torch.no_grad():
        module.weight[1] = 0
    x = torch.randn(shape, device=device) + spread(torch.arange(6, device=device) / 4, torch.empty(shape))
    x = layout(x.to(dtype))
    assert_follows(shared, module, x, residual=residual, activation=activation)
    assert x.dim() == 3 or same_format(module(x), x)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
def test_groups(groups: int, options: dict, device: str) -> None:
    module = SharedBatchNorm2d(6, groups, device=device, dtype=torch.float64, **options)
    x = torch.randn(10, 6, 5, 7, device=device, dtype=torch.float64)
    assert_follows(shared, module, x, residual=True, activation="relu")
    if groups == 6:
        torch.testing.assert_close(module(x), bn_ext.BatchNorm2d(6, device=device, dtype=torch.float64)(x))


ZEROS = {
    "a zero": lambda w: w.index_fill(0, torch.tensor([1], device=w.device), 0),
    "a tiny one": lambda w: w.index_fill(0, torch.tensor([1], device=w.device), 1e-30),
    "a group of zeros": lambda w: w.index_fill(0, torch.arange(3, device=w.device), 0),
    "all zeros": torch.zeros_like,
    "a large one": lambda w: w.index_fill(0, torch.tensor([2], device=w.device), 100),
}


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("weights", ZEROS)
def test_weights_that_are_zero(weights: str, dtype: torch.dtype, activation: str | None, device: str) -> None:
    """The gradient that comes through the statistics reaches channels of any weight. A bias of 0 behind one of 0 is at
    the kink of relu: no gradient passes it, as in torch."""
    module = randomized(SharedBatchNorm2d(6, 2, device=device, dtype=dtype))
    with torch.no_grad():
        module.weight.copy_(ZEROS[weights](module.weight))
        module.bias[:3] = 0
    x = torch.randn(10, 6, 5, 7, device=device, dtype=dtype)
    module(x).sum().backward()
    assert_follows(shared, module, x, residual=activation != "relu", activation=activation)
    if activation == "relu":
        zeros = torch.zeros_like(x)
        theirs = other_sets.results(lambda x, r: shared(module, x).add(r).relu(), module, x, zeros)
        ours = other_sets.results(lambda x, r: module(x, r, activation="relu"), module, x, zeros)
        scale = max(1, theirs["dx"].abs().max().item())
        torch.testing.assert_close(ours["dx"], theirs["dx"], rtol=1e-5, atol=1e-5 * scale)
        torch.testing.assert_close(ours["dresidual"], theirs["dresidual"])


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_and_evaluation(momentum: float | None, device: str) -> None:
    """Equal within a group; torch's class computes the same from them."""
    module = SharedBatchNorm2d(6, 2, momentum=momentum, device=device, dtype=torch.float64)
    mean, var = (t.clone() for t in (module.running_mean, module.running_var))
    for k in range(1, 4):
        x = torch.randn(10, 6, 5, 7, device=device, dtype=torch.float64) * k + k
        module(x)
        m = momentum or 1 / k
        values = x.unflatten(1, (2, 3)).transpose(0, 1).flatten(1)
        mean = mean.lerp(values.mean(1).repeat_interleave(3), m)
        var = var.lerp(values.var(1).repeat_interleave(3), m)
    torch.testing.assert_close(module.running_mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(module.running_var, var, rtol=1e-13, atol=1e-13)
    assert module.num_batches_tracked.item() == 3
    theirs = nn.BatchNorm2d(6, device=device, dtype=torch.float64).eval()
    assert theirs.load_state_dict(module.state_dict()) == ([], [])
    assert isinstance(module, nn.BatchNorm2d)
    torch.testing.assert_close(module.eval()(x), theirs(x))
    bn_ext.train.freeze(module)
    torch.testing.assert_close(module.train()(x), theirs(x))


def test_a_large_mean(device: str) -> None:
    """No cancellation: the rule of the project's numerics, for channels whose means lie close to one another."""
    x = torch.randn(10, 6, 5, 7, device=device, dtype=torch.float64)
    offset = 1e5
    far = (x + offset).float()
    exact = shared(SharedBatchNorm2d(6, 2, affine=False, dtype=torch.float64), far.double())
    torch.testing.assert_close(
        SharedBatchNorm2d(6, 2, affine=False, device=device)(far), exact.float(), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("residual", [(6, 1, 1), (10, 6, 5, 7), None], ids=str)
def test_residuals_that_torch_adds(residual, device: str) -> None:
    module = randomized(SharedBatchNorm2d(6, 2, device=device))
    x = torch.randn(10, 6, 5, 7, device=device)
    plain = module(x)
    added = 2.0 if residual is None else torch.randn(residual, device=device, dtype=torch.float64)
    torch.testing.assert_close(module(x, added, activation="relu"), (plain + added).relu())


@pytest.mark.parametrize("activation", activations.NAMES)
def test_every_activation(activation: str, device: str) -> None:
    module = randomized(SharedBatchNorm2d(6, 2, device=device))
    x = torch.randn(3, 6, 2, 2, device=device)
    ours = other_sets.results(lambda x, r: module(x, r, activation=activation), module, x, x.flip(0))
    theirs = other_sets.results(
        lambda x, r: activations.apply(shared(module, x) + r, activation, None), module, x, x.flip(0)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_kept(device: str) -> None:
    """Of the input's size the input alone, and a bit an element for relu."""
    module = randomized(SharedBatchNorm2d(6, 2, device=device))
    x, residual = torch.randn(2, 10, 6, 8, 8, device=device).unbind()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x.requires_grad_(), residual.requires_grad_(), activation="relu")
    sizes = {t.data_ptr(): t.numel() * t.element_size() for t in kept if t.numel() > 60}
    assert sorted(sizes.values()) == [x.numel() // 8, x.numel() * 4]


def test_around() -> None:
    module = randomized(SharedBatchNorm2d(4, 2))
    x = torch.randn(5, 4, 3, 3)
    other_sets.assert_copies(module, x)
    other_sets.assert_deterministic(module, x)
    other_sets.assert_transforms(module, x)
    other_sets.assert_refuses(module, x)
    other_sets.assert_compiles(module, x, activation="relu")
    other_sets.assert_exports(module, x, training=None)
    scripted = torch.jit.script(module.eval())
    assert torch.equal(scripted(x), module(x))
    with pytest.raises(torch.jit.Error, match=r"TorchScript has no form of shared statistics: script in evaluation"):
        scripted.train()(x)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(activation: str | None) -> None:
    module = randomized(SharedBatchNorm2d(4, 2, dtype=torch.float64))
    with torch.no_grad():
        module.weight[1] = 0
    other_sets.assert_gradcheck(module, torch.randn(3, 4, 2, 1), activation=activation)


def test_a_second_derivative_without_the_residual(device: str) -> None:
    module = randomized(SharedBatchNorm2d(4, 2, device=device))
    x = torch.randn(3, 4, 2, 2, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative needs the residual, which relu does not keep"):
        torch.autograd.grad(module(x, x, activation="relu").sum(), x, create_graph=True)
    (first,) = torch.autograd.grad(module(x, activation="relu").square().sum(), x, create_graph=True)
    (plain,) = torch.autograd.grad(shared(module, x).relu().square().sum(), x, create_graph=True)
    torch.testing.assert_close(
        *(torch.autograd.grad(g.sin().sum(), x)[0] for g in (first, plain)), rtol=1e-3, atol=1e-3
    )


def test_autocast() -> None:
    other_sets.assert_autocast(nn.Conv2d(3, 4, 1), SharedBatchNorm2d(4, 2), torch.randn(5, 3, 4, 4))


def test_construction() -> None:
    module = SharedBatchNorm2d(6, 3, eps=1e-3, momentum=None, affine=False, dtype=torch.float64)
    assert (module.eps, module.momentum, module.weight, module.stat_groups) == (1e-3, None, None, 3)
    assert "track_running_stats=True, stat_groups=3, bn_ext)" in repr(module)
    for groups in (4, 0, -2):
        with pytest.raises(ValueError, match=f"num_features should be divisible by stat_groups, got 6 and {groups}"):
            SharedBatchNorm2d(6, groups)
    with pytest.raises(TypeError, match="stat_groups should be an int, got float"):
        SharedBatchNorm2d(6, 1e-5)
    with pytest.raises(ValueError, match="track_running_stats should be True"):
        SharedBatchNorm2d(6, 2, track_running_stats=False)


def test_mistakes() -> None:
    module = randomized(SharedBatchNorm1d(4, 2))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"expected 2D or 3D input"):
        module(torch.randn(2, 4, 3, 3))
    with pytest.raises(RuntimeError, match="should contain 6 elements not 4"):
        module(torch.randn(2, 6))
    with pytest.raises(ValueError, match="activation should be"):
        module(torch.randn(2, 4), activation="rule")
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 4), torch.randn(3, 4))
    with pytest.raises(NotImplementedError, match=r"got torch\.int64"):
        module(torch.ones(2, 4, dtype=torch.int64))
    for wrong, error, message in (
        (torch.randn(2), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        (
            torch.randn(2, 4) + 0j,
            NotImplementedError,
            r"batch_norm\(\): expected an input of type .*, got torch.complex64",
        ),
        (torch.randn(2, 4).to_sparse(), NotImplementedError, "expected a strided input, got torch.sparse_coo"),
        (torch.randn(1, 2), RuntimeError, "running_mean should contain 2 elements not 4"),
    ):
        with pytest.raises(error, match=message):
            module(wrong)
        if wrong.layout == torch.strided:
            with FakeTensorMode() as fake, pytest.raises(error, match=message):
                SharedBatchNorm1d(4, 2)(fake.from_tensor(wrong))
    module.eps = 0.0
    with pytest.raises(ValueError, match="eps must be positive"):
        module(torch.randn(2, 4))
    assert other_sets.same(module.state_dict(), before)


def test_few_values() -> None:
    """One value per channel is enough, if not for a group of one. No values change no statistics."""
    module = randomized(SharedBatchNorm1d(4, 2, dtype=torch.float64))
    assert_follows(shared, module, torch.randn(1, 4).double())
    with pytest.raises(
        ValueError, match=r"more than 1 value per group when training, got input size torch.Size\(\[1, 4"
    ):
        SharedBatchNorm1d(4, 4)(torch.randn(1, 4))
    for shape in ((0, 4), (0, 4, 3), (2, 4, 0)):
        fresh = SharedBatchNorm1d(4, 2)
        x = torch.empty(shape, requires_grad=True)
        fresh(x).sum().backward()
        assert torch.equal(fresh.running_var, torch.ones(4))
        assert torch.equal(fresh.weight.grad, torch.zeros(4))


def test_whole_models() -> None:
    """Conversions leave the class alone; it is folded, recalibrated and checkpointed, but not fused or adapted."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), SharedBatchNorm2d(6, 2), nn.ReLU())
    x = torch.randn(10, 3, 4, 4)
    expected = model(x)
    assert type(bn_ext.revert(bn_ext.convert(model))[1]) is SharedBatchNorm2d
    torch.testing.assert_close(bn_ext.fuse(model)(x), expected)
    model = bn_ext.graph.unfuse(model)
    for sequential in (False, True):
        bn_ext.train.recalibrate(model, [x, x + 1], sequential, progress=False)
        values = model[0](torch.cat([x, x + 1])).unflatten(1, (2, 3)).transpose(0, 1).flatten(1)
        found = model[1].running_mean, model[1].running_var
        torch.testing.assert_close(found, (values.mean(1).repeat_interleave(3), values.var(1).repeat_interleave(3)))
        assert model[1].num_batches_tracked == 2
    before = copy.deepcopy(model.state_dict())
    with bn_ext.train.keep_statistics(model):
        model(x)
    with bn_ext.train.skip_nonfinite(model):
        model(x / 0)
    assert other_sets.same(model.state_dict(), before)
    y = checkpoint(model, x, use_reentrant=False, context_fn=bn_ext.checkpoint_contexts)
    after = copy.deepcopy(model.state_dict())
    y.sum().backward()
    assert other_sets.same(model.state_dict(), after)
    assert model[1].num_batches_tracked == 3
    model.eval()
    folded = bn_ext.fold(model, x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x))
    plain = model(x)
    assert "left as it is" in bn_ext.train.adapt(model, 0.0).rows[0].changed
    assert torch.equal(model(x), plain)
    assert [(row.cls, row.runs_on) for row in bn_ext.report(model).rows] == [("SharedBatchNorm2d", "bn_ext")]
