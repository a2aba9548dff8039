"""recalibrate: running statistics of a whole data set."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helped import WAYS, Several, assert_same, images, state
from processes import in_each_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import bn_ext
from bn_ext.train import freeze

recalibrate = functools.partial(bn_ext.train.recalibrate, progress=False)
SIZES = (6, 3, 9, 2)


def inputs(sizes: Iterable[int] = SIZES) -> list[Tensor]:
    return [images(n).add(n).double() for n in sizes]


def model_in(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return Several(functions=False).to(dtype)


def norms(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "running_mean")}


def pooled(model: nn.Module, batches: list[Tensor], training: Callable[[str], bool]) -> dict[str, Tensor]:
    """The mean and the unbiased variance of all that each batch norm is given, with some of them in training."""
    model = copy.deepcopy(model).eval()
    seen: dict[str, list[Tensor]] = {name: [] for name in norms(model)}
    for name, module in norms(model).items():
        module.train(training(name))
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    values = {name: torch.cat([t.transpose(0, 1).flatten(1) for t in ts], 1) for name, ts in seen.items()}
    return {
        **{f"{name}.running_mean": t.mean(1) for name, t in values.items()},
        **{f"{name}.running_var": t.var(1) for name, t in values.items()},
        **{f"{name}.num_batches_tracked": torch.tensor(len(batches)) for name in values},
    }


def assert_pooled(model: nn.Module, expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    got = {name: model.state_dict()[name] for name in expected}
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", WAYS)
def test_pools_all_values_of_unequal_batches(way: str) -> None:
    torch._dynamo.reset()
    model, batches = model_in(), inputs()
    expected = pooled(model, batches, lambda _: True)
    call = WAYS[way](model)
    model.conv.eval()
    before, modes = state(model), [m.training for m in model.modules()]
    record = recalibrate(call, batches)
    assert_pooled(model, expected)
    assert modes == [m.training for m in model.modules()]
    assert record.rows[0][2].startswith("500 values of 4 batches: mean moved ")
    record.undo()
    assert_same(state(model), before)


def test_float32_far_from_zero_and_poisoned() -> None:
    """The mean of a batch is not rounded before it is pooled: 1e5 deviations away, that would make a variance."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].running_mean.fill_(torch.nan)
    model[0].running_var.fill_(torch.inf)
    data = torch.randn(4000, 2) + torch.tensor([1e5, -3e5])
    recalibrate(model, data.split(40))
    torch.testing.assert_close(model[0].running_var, data.double().var(0).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(model[0].running_mean, data.double().mean(0).float(), rtol=1e-7, atol=0)


class Calls(TorchDispatchMode):
    """The operators that are called with a tensor as large as a batch of the smallest."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(a, Tensor) and a.numel() >= 2 * 4 * 25 for a in args):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_every_tensor_is_read_once() -> None:
    """For each batch and layer one operator that normalizes and reduces at once, and no other reduction."""
    model, batches = model_in(), inputs()
    with Calls() as calls:
        recalibrate(model, batches)
    once = len(batches)
    assert calls.counts == {
        "aten::convolution": once,
        "aten::relu": once,
        "bn_ext::batch_norm_forward": 3 * once,
    }


def test_sequential() -> None:
    """Each layer sees what the layers before it give by their new statistics."""
    model, batches = model_in(), inputs()
    expected = copy.deepcopy(model)
    for name in ("theirs", "ours", "activated"):
        statistics = pooled(expected, batches, lambda _: False)
        expected.load_state_dict({k: v for k, v in statistics.items() if k.startswith(name)}, strict=False)
    record = recalibrate(model, batches, sequential=True)
    assert_pooled(model, expected.state_dict())
    assert all(row.changed.startswith("500 values of 4 batches") for row in record.rows)
    with pytest.raises(ValueError, match="give a list or a loader, not an iterator"):
        recalibrate(model, iter(batches), sequential=True)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_is_called_twice(sequential: bool) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x) * 2 + 1)

    model, x = Twice().double(), torch.randn(20, 3, dtype=torch.float64)
    record = recalibrate(model, [x], sequential)
    both = torch.cat([x, ((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()) * 2 + 1])
    assert_pooled(model.bn, {"running_mean": both.mean(0), "running_var": both.var(0)})
    assert [row.changed for row in record.rows][1] == "was not called"


def test_batches_and_forward(capsys: pytest.CaptureFixture) -> None:
    data = TensorDataset(torch.randn(20, 3), torch.zeros(20))
    expected = data.tensors[0].mean(0)
    for batches, forward in (
        (DataLoader(data, 8), None),
        ([{"x": data.tensors[0]}], lambda model, batch: model(batch["x"])),
    ):
        model = nn.Sequential(nn.BatchNorm1d(3))
        bn_ext.train.recalibrate(model, batches, forward=forward)
        torch.testing.assert_close(model[0].running_mean, expected)
    assert capsys.readouterr().err.startswith("\rrecalibrate: 1 batches\rrecalibrate: 2 batches")
    with pytest.raises(TypeError, match="got dict: say how to call the model"):
        recalibrate(model, [{}])
    with pytest.raises(ValueError, match="there are no batches"):
        recalibrate(model, [])


@pytest.mark.parametrize("calls", [3, 7])
def test_nothing_is_changed_by_an_exception(calls: int) -> None:
    """In the last batch, or layer by layer, once the first layer is recalibrated."""
    model = model_in()
    model.drop.eval()
    before, modes = state(model), [m.training for m in model.modules()]
    left = iter(range(calls))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        if next(left, None) is None:
            raise KeyError
        return model(batch)

    with pytest.raises(KeyError):
        recalibrate(model, inputs(), calls > len(SIZES), forward=forward)
    assert_same(state(model), before)
    assert modes == [m.training for m in model.modules()]
    assert {m.momentum for m in norms(model).values()} == {0.1, None, 0.3}


def test_layers_that_are_left() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    freeze(model[0])
    before = state(model[0])
    record = recalibrate(model, [torch.randn(20, 3)])
    assert_same(state(model[0]), before)
    assert [row.changed for row in record.rows][::2] == ["is frozen", "has no statistics"]
    assert model.training
    assert not model[0].training
    bn_ext.train.unfreeze(model)
    assert model[0].training


# ---------------------------------------------------------------------------------------------- processes


def _recalibrated() -> list[dict[str, Tensor]]:
    """The batches are dealt to two processes: three and one, then all and none."""
    torch.manual_seed(0)
    batches, states = inputs(), []
    for sequential, mine in ((False, 3), (True, 4)):
        model = model_in()
        dealt = batches[:mine] if dist.get_rank() == 0 else batches[mine:]
        recalibrate(model if sequential else DistributedDataParallel(model), dealt, sequential)
        states.append(state(model))
    return states


def test_processes_pool_their_batches(tmp_path: Path) -> None:
    batches = inputs()
    for states in in_each_of(2, tmp_path, _recalibrated):
        for sequential, got in zip((False, True), states, strict=True):
            alone = model_in()
            recalibrate(alone, batches, sequential)
            torch.testing.assert_close(got, alone.state_dict(), rtol=1e-12, atol=1e-12)
            assert alone.theirs.num_batches_tracked == 4
