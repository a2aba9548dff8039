"""Ghost batch norm: statistics over virtual batches of one batch, or noise that varies as theirs."""

from __future__ import annotations

import copy
import math

import other_sets
import pytest
import torch
from cases import channels_last, contiguous, same_format
from other_sets import assert_follows, calls, normalized, randomized, spread, tails
from torch import Tensor, nn

import bn_ext
from bn_ext import reference
from bn_ext.nn import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

SHAPES = [
    (GhostBatchNorm1d, (10, 6)),
    (GhostBatchNorm1d, (10, 6, 7)),
    (GhostBatchNorm2d, (10, 6, 5, 7)),
    (GhostBatchNorm3d, (9, 6, 2, 3, 4)),
]


WRONG_SIZES = [
    (0, ValueError, r"virtual_batch_size should be positive and less than 2\*\*63, got 0"),
    (2**63, ValueError, r"virtual_batch_size should be positive and less than 2\*\*63, got 9223372036854775808"),
    (2.0, TypeError, "virtual_batch_size should be an int, got float"),
    (True, TypeError, "virtual_batch_size should be an int, got bool"),
    ("2", TypeError, "virtual_batch_size should be an int, got str"),
]


def ghost(module: nn.Module, x: Tensor) -> Tensor:
    others = [0, *range(2, x.dim())]
    z = torch.cat([normalized(part, others) for part in x.split(module.virtual_batch_size)])
    return z * spread(module.weight, x) + spread(module.bias, x)


@calls
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize(("cls", "shape"), SHAPES, ids=str)
def test_values_and_gradients(cls: type, shape, layout, dtype, residual: bool, activation, device: str) -> None:
    """The last virtual batch is smaller. Parameters of half-precision calls are float32."""
    wide = torch.promote_types(dtype, torch.float32)
    module = randomized(cls(6, 4, device=device, dtype=wide))
    x = layout((torch.randn(shape, device=device) + 1).to(dtype))
    assert_follows(ghost, module, x, residual=residual, activation=activation)
    assert x.dim() == 3 or same_format(module(x), x)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum: float | None, device: str) -> None:
    """Towards the mean of all values and m2 / (count - virtual batches): v / (v - 1) times their biased variances."""
    module = GhostBatchNorm2d(6, 4, momentum=momentum, device=device, dtype=torch.float64)
    mean, var = torch.zeros(6).double(), torch.ones(6).double()
    for k in range(1, 4):
        x = torch.randn(10, 6, 5, 7, device=device, dtype=torch.float64) * k + k
        module(x)
        m = momentum or 1 / k
        mean = mean.lerp(reference.statistics(x.cpu())[0], m)
        var = var.lerp(reference.pooled_variance(x.cpu(), 4), m)
    torch.testing.assert_close(module.running_mean.cpu(), mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(module.running_var.cpu(), var, rtol=1e-13, atol=1e-13)
    assert module.num_batches_tracked.item() == 3
    whole = torch.randn(8, 6, 5, 7, device=device, dtype=torch.float64)
    fresh = GhostBatchNorm2d(6, 4, momentum=1.0, device=device, dtype=torch.float64)
    fresh(whole)
    parts = torch.stack([reference.statistics(part.cpu())[1] for part in whole.split(4)]).mean(0)
    torch.testing.assert_close(fresh.running_var.cpu(), parts * (140 / 139), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("noise", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
def test_evaluation_and_frozen_modules_are_torchs(noise: bool, tracks: bool, device: str) -> None:
    module = randomized(GhostBatchNorm2d(6, 4, noise, track_running_stats=tracks, device=device)).eval()
    theirs = nn.BatchNorm2d(6, track_running_stats=tracks, device=device).eval()
    assert theirs.load_state_dict(module.state_dict()) == ([], [])
    assert isinstance(module, nn.BatchNorm2d)
    x = torch.randn(10, 6, 5, 7, device=device)
    torch.testing.assert_close(module(x), theirs(x))
    bn_ext.train.freeze(module)
    torch.testing.assert_close(module.train()(x), theirs(x))


def test_one_operator(device: str) -> None:
    module = GhostBatchNorm2d(6, 4, device=device)
    x = torch.randn(10, 6, 5, 7, device=device)
    with torch.profiler.profile() as profile:
        module(x)
    assert {e.key: e.count for e in profile.key_averages()}["bn_ext::batch_norm_forward"] == 1


def test_a_batch_of_one_virtual_batch_is_plain(device: str) -> None:
    x = torch.randn(10, 6, 5, 7, device=device)
    for size, noise in ((10, False), (2**63 - 1, False), (10, True), (32, True)):
        module, plain = GhostBatchNorm2d(6, size, noise, device=device), bn_ext.BatchNorm2d(6, device=device)
        assert torch.equal(module(x), plain(x))
        assert other_sets.same(module.state_dict(), plain.state_dict())


# ---------------------------------------------------------------------------------------------- noise


def noisy(module: nn.Module, x: Tensor) -> Tensor:
    """With the draws of a call after ``manual_seed(7)``."""
    torch.manual_seed(7)
    others = [0, *range(2, x.dim())]
    values = x[0, 0].numel()
    m = 1 / (1 / (module.virtual_batch_size * values) - 1 / (x.size(0) * values))
    drawn = torch.randn(2, x.size(1), device=x.device, dtype=module.drawn)
    n1, n2 = drawn[0] / math.sqrt(m), drawn[1] / math.sqrt(2 * m)
    std = (x.var(others, unbiased=False) + 1e-5).sqrt()
    mean = x.mean(others) + std * n1
    return (x - spread(mean, x)) / spread(std * n2.exp(), x) * spread(module.weight, x) + spread(module.bias, x)


@tails
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_noise(dtype: torch.dtype, residual: bool, activation, device: str) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    module = randomized(GhostBatchNorm2d(6, 4, noise=True, device=device, dtype=wide))
    module.drawn = wide
    module.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    x = torch.randn(10, 6, 5, 7, device=device).to(dtype) + 1
    assert_follows(noisy, module, x, residual=residual, activation=activation)


def test_noise_without_parameters(device: str) -> None:
    module = GhostBatchNorm2d(6, 4, noise=True, affine=False, device=device)
    x = torch.randn(10, 6, 5, 7, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert module(x.to(dtype)).dtype == dtype
    plain = bn_ext.BatchNorm2d(6, affine=False, device=device)
    assert 0 < (module(x) - plain(x)).abs().max() < 0.5


def test_noise_varies_as_virtual_batches_do(device: str) -> None:
    """Mean and logarithm of the deviation of one channel over many virtual batches, and over many draws."""
    channels, v, n = 4000, 8, 64
    module = GhostBatchNorm1d(channels, v, noise=True, device=device, dtype=torch.float64)
    column = torch.randn(n, 1, device=device, dtype=torch.float64).expand(n, channels)
    y = module(column)
    slope = (y[1] - y[0]) / (column[1] - column[0])  # 1 / the noisy deviation
    std = column[:, 0].var(unbiased=False).add(1e-5).sqrt()
    n2 = -(slope * std).log()
    n1 = (column[0] - y[0] / slope - column[:, 0].mean()) / std
    m = 1 / (1 / v - 1 / n)
    for sample, variance in ((n1, 1 / m), (n2, 1 / (2 * m))):
        assert sample.mean().abs() < 4 * math.sqrt(variance / channels)
        assert abs(sample.var() / variance - 1) < 4 * math.sqrt(2 / channels)


def test_noise_is_reproducible_and_leaves_statistics(device: str) -> None:
    x = torch.randn(10, 6, 5, 7, device=device)
    outputs = []
    for seed in (1, 1, 2):
        module, plain = GhostBatchNorm2d(6, 4, noise=True, device=device), bn_ext.BatchNorm2d(6, device=device)
        torch.manual_seed(seed)
        outputs.append(module(x))
        plain(x)
        assert other_sets.same(module.state_dict(), plain.state_dict())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# ---------------------------------------------------------------------------------------------- the function


@pytest.mark.parametrize("training", [True, False])
def test_the_function(training: bool, device: str) -> None:
    module = randomized(GhostBatchNorm2d(6, 4, device=device)).train(training)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    x = torch.randn(10, 6, 5, 7, device=device)
    y = bn_ext.functional.batch_norm(x, mean, var, module.weight, module.bias, training, virtual_batch_size=4)
    assert torch.equal(y, module(x))

    def call(x: Tensor, training: bool) -> Tensor:
        return bn_ext.functional.batch_norm(x, None, None, training=training, virtual_batch_size=4)

    if training:
        assert torch.equal(torch.jit.script(call)(x, training), call(x, training))
    assert torch.equal(mean, module.running_mean)
    assert torch.equal(var, module.running_var)


def test_the_function_refuses(device: str) -> None:
    x = torch.randn(10, 6, device=device)
    for wrong, error, message in WRONG_SIZES:
        with pytest.raises(error, match=message):
            bn_ext.functional.batch_norm(x, None, None, training=True, virtual_batch_size=wrong)
    with pytest.raises(TypeError):  # by name alone
        bn_ext.functional.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, None, None, None, 4)

    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return bn_ext.functional.batch_norm(x, None, None, training=True, virtual_batch_size=4)

    with pytest.raises(RuntimeError, match="virtual_batch_size is not exported in training: export with training=F"):
        torch.export.export(Call(), (x,), strict=False)


# ---------------------------------------------------------------------------------------------- everything around


@pytest.mark.parametrize("noise", [True, False])
def test_around(noise: bool) -> None:
    module = randomized(GhostBatchNorm2d(3, 2, noise))
    x = torch.randn(5, 3, 4, 4)
    if not noise:
        other_sets.assert_copies(module, x)
        other_sets.assert_deterministic(module, x)
        other_sets.assert_transforms(module, x)
        assert torch.equal(torch.jit.script(module)(x), module(x))
        other_sets.assert_compiles(module, x, activation="relu")
    other_sets.assert_exports(module, x, training=r"GhostBatchNorm2d is not exported in training: call eval\(\) first")
    other_sets.assert_refuses(module, x)


def test_noise_compiled_and_scripted() -> None:
    torch._dynamo.reset()
    module, x = GhostBatchNorm2d(3, 2, noise=True), torch.randn(5, 3, 4, 4)
    outputs = []
    for call in (module, torch.jit.script(module), torch.compile(module, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        outputs.append(call(x))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("noise", [True, False])
def test_gradcheck(noise: bool) -> None:
    module = randomized(GhostBatchNorm2d(2, 2, noise, dtype=torch.float64))
    module.register_forward_pre_hook(lambda *_: torch.manual_seed(7) and None)
    other_sets.assert_gradcheck(module, torch.randn(5, 2, 2, 1), activation="silu")


def test_autocast() -> None:
    other_sets.assert_autocast(nn.Conv2d(3, 3, 1), GhostBatchNorm2d(3, 2), torch.randn(5, 3, 4, 4))


def test_construction() -> None:
    module = GhostBatchNorm2d(3, 8, eps=1e-3, momentum=None, affine=False, dtype=torch.float64)
    assert (module.eps, module.momentum, module.weight, module.virtual_batch_size) == (1e-3, None, None, 8)
    assert "track_running_stats=True, virtual_batch_size=8, noise=False, bn_ext)" in repr(module)
    for wrong, error, message in WRONG_SIZES:
        with pytest.raises(error, match=message):
            GhostBatchNorm2d(3, wrong)
    with pytest.raises(TypeError, match="virtual_batch_size should be an int, got NoneType"):
        GhostBatchNorm2d(3, None)
    with pytest.raises(TypeError, match="noise should be a bool, got float"):
        GhostBatchNorm2d(3, 32, 0.1)


def test_few_values() -> None:
    """Virtual batches of one value are refused, but for a last, smaller one; nothing is changed. No images are none."""
    module = randomized(GhostBatchNorm1d(3, 1))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(5, 3))
    assert other_sets.same(module.state_dict(), before)
    module = GhostBatchNorm1d(3, 2)
    assert torch.equal(module(torch.randn(5, 3))[-1], module.bias)
    for noise in (True, False):
        module = GhostBatchNorm1d(3, 2, noise)
        assert module(torch.empty(0, 3, 4)).shape == (0, 3, 4)
        assert torch.equal(module.running_var, torch.ones(3))


def test_whole_models() -> None:
    """Conversions leave the class alone; it is fused, folded, frozen, adapted and recalibrated."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), GhostBatchNorm2d(6, 4), nn.ReLU())
    x = torch.randn(10, 3, 4, 4)
    expected = model(x)
    assert type(bn_ext.revert(bn_ext.convert(model))[1]) is GhostBatchNorm2d
    fused = bn_ext.fuse(model)
    torch.testing.assert_close(fused(x), expected)
    assert [fusion.fused for fusion in bn_ext.graph.fusions(fused)] == [("relu",)]
    model = bn_ext.graph.unfuse(fused)
    record = bn_ext.train.recalibrate(model, [x, x + 1], progress=False)
    inputs = model[0](torch.cat([x, x + 1]))
    mean, var = (t.float() for t in (reference.statistics(inputs)[0], inputs.transpose(0, 1).flatten(1).var(1)))
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), (mean, var))
    record.undo()
    with bn_ext.train.keep_statistics(model):
        torch.testing.assert_close(model(x), expected)
    model.eval()
    folded = bn_ext.fold(model, x)
    assert type(folded[1]) is nn.Identity
    torch.testing.assert_close(folded(x), model(x))
    rows = bn_ext.report(model).rows
    assert [(row.cls, row.runs_on) for row in rows] == [("GhostBatchNorm2d", "bn_ext")]
