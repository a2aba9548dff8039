"""Batch norm of (..., C): torch's results for (N, C, L), and nothing copied."""

from __future__ import annotations

import copy

import other_sets
import pytest
import torch
from cases import same_format
from other_sets import assert_follows, calls, normalized, randomized
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import bn_ext
from bn_ext.nn import BatchNormLast

SHAPES = [(10, 6), (10, 7, 6), (4, 5, 7, 6), (2, 3, 4, 5, 6), (9, 1, 6), (1, 9, 6)]


def last(module: nn.Module, x: Tensor) -> Tensor:
    return normalized(x, [*range(x.dim() - 1)]) * module.weight + module.bias


def contiguous(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    """Of a contiguous (N, C, ...)."""
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


def sliced(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], -1)[..., : x.size(-1)]


@calls
@pytest.mark.parametrize("layout", [contiguous, transposed, sliced])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, layout, dtype, residual: bool, activation, device: str) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    module = randomized(BatchNormLast(6, device=device, dtype=wide))
    x = layout((torch.randn(shape, device=device) + 1).to(dtype))
    assert_follows(last, module, x, residual=residual, activation=activation)
    if layout is not sliced:
        assert same_format(module(x), x)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_state_is_torchs(momentum: float | None, device: str) -> None:
    """Three batches, and an evaluation, as torch's class for (N, C, L)."""
    module = randomized(BatchNormLast(6, momentum=momentum, device=device, dtype=torch.float64))
    theirs = nn.BatchNorm1d(6, momentum=momentum, device=device, dtype=torch.float64)
    assert not isinstance(module, nn.BatchNorm1d)
    module.num_batches_tracked.zero_()
    assert theirs.load_state_dict(module.state_dict()) == ([], [])
    for k in range(4):
        x = torch.randn(10, 7, 6, device=device, dtype=torch.float64) * (k + 1) + k
        module.train(k < 3), theirs.train(k < 3)
        torch.testing.assert_close(module(x), theirs(x.mT).mT, rtol=1e-12, atol=1e-12)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [contiguous, transposed])
@pytest.mark.parametrize("shape", [(10, 7, 6), (4, 5, 7, 6)], ids=str)
def test_nothing_is_copied(layout, shape, device: str) -> None:
    """The backward keeps the input itself, and a call is one operator but for views."""
    module, x = BatchNormLast(6, device=device), layout(torch.randn(shape, device=device)).requires_grad_()
    kept: list[Tensor] = []
    with (
        torch.profiler.profile() as profile,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        module(x, x, activation="relu")
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}
    ran = {event.key for event in profile.key_averages()}
    assert not ran & {"aten::copy_", "aten::clone", "aten::contiguous"}
    assert "bn_ext::batch_norm_forward" in ran


@pytest.mark.parametrize("layout", [contiguous, transposed])
def test_residuals_that_torch_adds(layout, device: str) -> None:
    module = randomized(BatchNormLast(6, device=device))
    x = layout(torch.randn(10, 7, 6, device=device))
    plain = module(x)
    for residual in (torch.randn(6), torch.randn(7, 1), torch.tensor(2.0), torch.randn(10, 7, 6).double()):
        expected = (plain + residual.to(device)).relu()
        torch.testing.assert_close(module(x, residual.to(device), activation="relu"), expected)
    torch.testing.assert_close(module(x, 2.0, activation="relu"), (plain + 2).relu())
    for sizes in ([5, 10, 7, 6], [10, 5, 6]):
        with pytest.raises(
            RuntimeError, match=rf"^batch_norm: residual of sizes \{sizes} for an input of sizes \[10, 7, 6]"
        ):
            module(x, torch.randn(sizes, device=device))


def test_around() -> None:
    module, x = randomized(BatchNormLast(3)), torch.randn(4, 5, 3)
    other_sets.assert_copies(module, x)
    other_sets.assert_deterministic(module, x)
    other_sets.assert_transforms(module, x)
    other_sets.assert_refuses(module, x)
    scripted = torch.jit.script(copy.deepcopy(module))
    assert torch.equal(scripted(x, x, "relu"), module(x, x, "relu"))
    for one in (x, transposed(x)):
        other_sets.assert_compiles(module, one, activation="relu")
        other_sets.assert_exports(module, one, training=None)


def test_gradcheck() -> None:
    module = randomized(BatchNormLast(2, dtype=torch.float64))
    other_sets.assert_gradcheck(module, torch.randn(3, 2, 2), activation="silu")


def test_autocast() -> None:
    other_sets.assert_autocast(nn.Linear(3, 3), BatchNormLast(3), torch.randn(8, 5, 3))


def test_mistakes() -> None:
    module = randomized(BatchNormLast(3))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"expected 2D input or more, \(..., C\), got 1D input"):
        module(torch.randn(3))
    with pytest.raises(RuntimeError, match="should contain 4 elements not 3"):
        module(torch.randn(2, 3, 4))
    for sizes in ([1, 3], [1, 1, 3], [1, 1, 1, 3]):
        message = rf"more than 1 value per channel when training, got input size torch.Size\(\{sizes}\)"
        without = BatchNormLast(3, track_running_stats=False).eval()
        for one in (module, without):
            with pytest.raises(ValueError, match=message):
                one(torch.randn(sizes))
        with FakeTensorMode(), pytest.raises(ValueError, match=message):
            BatchNormLast(3)(torch.empty(sizes))
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        module([1.0])
    assert other_sets.same(module.state_dict(), before)
    for shape in ((0, 3), (0, 5, 3), (2, 0, 3)):
        assert module(torch.empty(shape)).shape == shape
    assert BatchNormLast(0, affine=False)(torch.empty(4, 5, 0)).shape == (4, 5, 0)


def test_whole_models() -> None:
    model, x = nn.Sequential(nn.Linear(3, 6), BatchNormLast(6), nn.ReLU()), torch.randn(10, 5, 3)
    expected = model(x)
    assert type(bn_ext.revert(bn_ext.convert(model))[1]) is BatchNormLast
    torch.testing.assert_close(bn_ext.fuse(model)(x), expected)
    model = bn_ext.graph.unfuse(model)
    bn_ext.train.recalibrate(model, [x, x + 1], progress=False)
    inputs = model[0](torch.cat([x, x + 1])).flatten(0, 1)
    torch.testing.assert_close((model[1].running_mean, model[1].running_var), (inputs.mean(0), inputs.var(0)))
    model.eval()
    folded = bn_ext.fold(model, x)
    torch.testing.assert_close(folded(x), model(x))
    assert [(fold.batch_norm, fold.into) for fold in bn_ext.graph.folds(folded)] == [("1", "")]
    across = nn.Sequential(nn.Conv1d(3, 6, 1), randomized(BatchNormLast(6))).eval()  # over positions, not channels
    image = torch.randn(10, 3, 6)
    torch.testing.assert_close(bn_ext.fold(across, image)(image), across(image))
    bn_ext.train.adapt(model, 0.0)
    torch.testing.assert_close(model(x), copy.deepcopy(model).train()(x))
    assert [(row.cls, row.runs_on) for row in bn_ext.report(model).rows] == [("BatchNormLast", "bn_ext")]
