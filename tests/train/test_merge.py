"""merge_state_dicts and averaging: models averaged, their statistics pooled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helped import Several, assert_same, images, state
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bn_ext
from bn_ext.train import averaging, merge_state_dicts, recalibrate


def model(shift: float) -> nn.Module:
    model = Several(functions=False)
    for _ in range(int(shift) + 2):
        model(images() + shift)
    return model


def test_pools_statistics_and_averages_the_rest() -> None:
    models = [model(shift) for shift in (0, 1, 3)]
    states, counts = [m.state_dict() for m in models], [10, 30, 60]
    before = copy.deepcopy(states)
    merged = merge_state_dicts(states, counts)
    for one, other in zip(states, before, strict=True):
        assert_same(one, other)

    def mean(name: str) -> torch.Tensor:
        return sum(c / 100 * s[name].double() for c, s in zip(counts, states, strict=True))

    for name, value in merged.items():
        if name.endswith("num_batches_tracked"):
            assert value.dtype == torch.int64
            assert value.item() == 2 + 3 + 5
        elif name.endswith("running_var"):
            means = name.replace("var", "mean")
            between = sum(c / 100 * (s[means] - mean(means)).square() for c, s in zip(counts, states, strict=True))
            torch.testing.assert_close(value, (mean(name) + between).float(), rtol=1e-6, atol=1e-6)
            assert between.max() > 1e-3
        else:
            torch.testing.assert_close(value, mean(name).float(), rtol=1e-6, atol=1e-6)
    models[0].load_state_dict(merged)
    assert "average of 3 models" in repr(merged)
    assert [row.path for row in merged.record.rows] == ["theirs", "ours", "activated"]


def test_is_what_all_data_give() -> None:
    """The statistics of parts of the data, pooled, are those of the whole."""
    data = torch.randn(4000, 2).cumsum(0).mul(0.1)
    parts = [nn.BatchNorm1d(2) for _ in range(2)]
    pieces = data.split([1000, 3000])
    for part, piece in zip(parts, pieces, strict=True):
        recalibrate(part, piece.split(500), progress=False)
    merged = merge_state_dicts([part.state_dict() for part in parts], [1000, 3000])
    torch.testing.assert_close(merged["running_mean"], data.mean(0))
    torch.testing.assert_close(merged["running_var"], data.var(0), rtol=1e-3, atol=0)
    assert merged["num_batches_tracked"] == 8


def test_types_and_what_has_no_average() -> None:
    def one(number: int) -> dict:
        half, index = torch.full((2,), float(number), dtype=torch.float16), torch.arange(3)
        return {"half": half, "index": index, "wave": torch.tensor([1j * number]), "_extra_state": "x"}

    merged = merge_state_dicts([one(1), one(2), one(9)], [1, 1, 0])
    assert merged["half"].dtype == torch.float16
    assert merged["half"].tolist() == [1.5, 1.5]
    assert merged["wave"].tolist() == [1.5j]
    assert merged["index"].tolist() == [0, 1, 2]
    assert merged["_extra_state"] == "x"
    with pytest.raises(ValueError, match="index has no average"):
        merge_state_dicts([one(1), one(1) | {"index": torch.zeros(3)}])


def test_a_model_without_weight_is_not_read() -> None:
    spoiled = nn.BatchNorm1d(2)
    spoiled.running_mean.fill_(torch.nan)
    merged = merge_state_dicts([nn.BatchNorm1d(2).state_dict(), spoiled.state_dict()], [5, 0])
    assert merged["running_mean"].tolist() == [0, 0]
    assert copy.deepcopy(merged).record.rows
    assert not merged["running_var"].isnan().any()


@pytest.mark.parametrize(
    ("states", "counts", "message"),
    [
        ([], None, "got 0 states"),
        ([{}], [1, 2], "got 1 states and 2 counts"),
        ([{}, {}], [1, -1], "counts should be 0 or more"),
        ([{}, {}], [0, 0], "not all 0"),
        ([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}], None, "states 0 and 1 differ in 'a'"),
        ([{"a": torch.zeros(1)}, {"a": torch.zeros(2)}], None, r"a is of sizes \(1,\) and \(2,\)"),
    ],
)
def test_mistakes(states: list, counts: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_state_dicts(states, counts)


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, bn_ext.BatchNorm1d])
def test_averaged_model_counts_right(cls: type, decay: float | None) -> None:
    """Torch's own function gives 6 and 3."""
    trained = nn.Sequential(cls(3))
    average = AveragedModel(trained, multi_avg_fn=averaging(decay), use_buffers=True)
    means = []
    for _ in range(4):
        for _ in range(3):
            trained(torch.randn(8, 3))
        average.update_parameters(trained)
        means.append(trained[0].running_mean.clone())
    counter = average.module[0].num_batches_tracked
    assert counter.dtype == torch.int64
    assert counter == 12
    expected = means[0]
    for n, mean in enumerate(means[1:], 1):
        expected = expected.lerp(mean, 1 / (n + 1) if decay is None else 1 - decay)
    torch.testing.assert_close(average.module[0].running_mean, expected)
    with pytest.raises(ValueError, match="decay should be from 0 to 1"):
        averaging(2)


def test_pickles() -> None:
    merged = merge_state_dicts([state(nn.BatchNorm1d(2))])
    assert pickle.loads(pickle.dumps(merged)).keys() == merged.keys()
