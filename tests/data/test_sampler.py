"""Stratified batches: every index once, classes by their shares, alike in all processes, bad labels refused."""

from __future__ import annotations

import array
import math
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Sampler, TensorDataset

from bn_ext.data import StratifiedBatchSampler

WITHOUT_DEADLINE = settings(deadline=None, derandomize=True)
CLASSES = st.lists(st.integers(0, 9), min_size=1, max_size=150)


def assert_is_stratified(batches: list[list[int]], labels: list, batch_size: int) -> None:
    """Every index once; sizes that differ by one at most; of each class the floor of its share, or one more."""
    assert sorted(index for batch in batches for index in batch) == list(range(len(labels)))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
    for batch in batches:
        held = Counter(labels[index] for index in batch)
        for label, count in Counter(labels).items():
            assert 0 <= held[label] - len(batch) * count // len(labels) <= 1


@WITHOUT_DEADLINE
@given(CLASSES, st.integers(1, 40), st.integers(0, 3))
def test_an_epoch(labels: list[int], batch_size: int, seed: int) -> None:
    sampler = StratifiedBatchSampler(labels, batch_size, seed)
    batches = list(sampler)
    assert len(sampler) == len(batches) == math.ceil(len(labels) / batch_size)
    assert_is_stratified(batches, labels, batch_size)


@WITHOUT_DEADLINE
@given(CLASSES, st.integers(2, 20), st.integers(1, 5))
def test_processes_share_an_epoch(labels: list[int], batch_size: int, world_size: int) -> None:
    """Each gets as many batches as the others, and no example is left out or given twice."""
    if len(labels) < world_size:
        with pytest.raises(ValueError, match="too few"):
            StratifiedBatchSampler(labels, batch_size, rank=0, world_size=world_size)
        return
    samplers = [StratifiedBatchSampler(labels, batch_size, rank=r, world_size=world_size) for r in range(world_size)]
    batches = [list(sampler) for sampler in samplers]
    steps = math.ceil(len(labels) / (batch_size * world_size))
    assert {len(each) for each in batches} == {len(sampler) for sampler in samplers} == {steps}
    assert_is_stratified([batch for each in batches for batch in each], labels, batch_size)


@WITHOUT_DEADLINE
@given(st.lists(st.sampled_from([2, 3, 5]), min_size=2, max_size=4), st.integers(1, 4))
def test_shares_without_remainders(shares: list[int], batches: int) -> None:
    """Where every share is a whole number, every batch has exactly that."""
    labels = [label for label, share in enumerate(shares) for _ in range(share * batches)]
    for batch in StratifiedBatchSampler(labels, sum(shares)):
        assert Counter(labels[index] for index in batch) == dict(enumerate(shares))


def test_a_class_rarer_than_batches() -> None:
    """No batch holds two of it while another holds none."""
    labels = ["often"] * 95 + ["rare"] * 5
    held = sorted(sum(labels[index] == "rare" for index in batch) for batch in StratifiedBatchSampler(labels, 10))
    assert held == [0] * 5 + [1] * 5


def test_the_means_of_batches_vary_less() -> None:
    """By 1 - η², the fraction of the variance that is not between the classes."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(500)
    values = labels / 4 + torch.randn(5000, generator=random)
    within = torch.stack([values[labels == label].var(correction=0) for label in range(10)]).mean()
    sampler = StratifiedBatchSampler(labels, 50)
    means = [values[batch].mean() for _ in range(20) for batch in sampler]
    chance = values[torch.stack([torch.randperm(5000, generator=random) for _ in range(20)])].view(-1, 50).mean(1)
    ratio = torch.stack(means).var() / chance.var()
    assert ratio.item() == pytest.approx((within / values.var(correction=0)).item(), rel=0.15)


# ------------------------------------------------------------------------------------------ epochs


def test_epochs() -> None:
    """Each iteration is the next epoch, with other batches; an epoch that is set is the same again."""
    labels = [0, 1, 2] * 20
    sampler = StratifiedBatchSampler(labels, 12)
    first, second = list(sampler), list(sampler)
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert_is_stratified(second, labels, 12)
    sampler.set_epoch(1)
    assert list(sampler) == second
    resumed = StratifiedBatchSampler(labels, 12)
    resumed.set_epoch(1)
    assert list(resumed) == second
    assert list(StratifiedBatchSampler(labels, 12, seed=1)) not in (first, second)


def test_the_order_of_batches_is_random() -> None:
    """Neither the longer batches nor those with remainders of the same class come first."""
    labels = ["often"] * 96 + ["rare"] * 5
    sampler = StratifiedBatchSampler(labels, 11)
    epochs = [list(sampler) for _ in range(8)]
    longer = {tuple(len(batch) > 10 for batch in epoch) for epoch in epochs}
    rare = {tuple(any(labels[index] == "rare" for index in batch) for batch in epoch) for epoch in epochs}
    assert len(longer) > 3 and len(rare) > 3


def test_places_in_a_batch_are_random() -> None:
    """So that statistics of a part of a batch are stratified on average, too."""
    labels = [0] * 300 + [1] * 300
    front = [labels[index] for batch in StratifiedBatchSampler(labels, 20) for index in batch[:10]]
    assert 100 < sum(front) < 200


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(workers: int) -> None:
    """A loader makes more than one iterator of its batch sampler, and uses one."""
    labels = torch.arange(5).repeat(8)
    sampler = StratifiedBatchSampler(labels, 10)
    assert isinstance(sampler, Sampler)
    expected = [list(StratifiedBatchSampler(labels, 10)), list(sampler)]
    sampler.set_epoch(0)
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_sampler=sampler, num_workers=workers)
    epochs = [[batch.tolist() for (batch,) in loader]]
    assert epochs == expected[:1] and len(loader) == 4


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(StratifiedBatchSampler([0, 1] * 8, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_process_group_tells_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_rank": 1, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    labels = [0, 1] * 8
    assert list(StratifiedBatchSampler(labels, 4)) == list(StratifiedBatchSampler(labels, 4, rank=1, world_size=2))
    assert len(StratifiedBatchSampler(labels, 4, rank=0, world_size=1)) == 4  # what is given comes first


# ------------------------------------------------------------------------------------------ labels

NUMBERS = [0, 0, 1, 1, 2, 2]
SEQUENCES = {
    "list": NUMBERS,
    "tuple": tuple(NUMBERS),
    "ndarray": np.array(NUMBERS),
    "column": np.array([NUMBERS, NUMBERS]).T[:, 0],
    "tensor": torch.tensor(NUMBERS),
    "bytes": torch.tensor(NUMBERS, dtype=torch.uint8),
    "tensors": [torch.tensor(number) for number in NUMBERS],
    "scalars": list(np.array(NUMBERS)),
    "strings": ["a", "a", "b", "b", "c", "c"],
    "array of strings": np.array(["a", "a", "b", "b", "c", "c"]),
    "deque": deque(NUMBERS),
    "array": array.array("i", NUMBERS),
    "floats": [0.5, 0.5, 1.0, 1.0, 2.0, 2.0],
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_of_labels(kind: str) -> None:
    assert list(StratifiedBatchSampler(SEQUENCES[kind], 3)) == list(StratifiedBatchSampler(NUMBERS, 3))


def test_a_range_of_labels() -> None:
    """Every example is a class: what is left is to shuffle."""
    assert_is_stratified(list(StratifiedBatchSampler(range(10), 4)), list(range(10)), 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": "abc"}, TypeError, "should be a sequence with the class of each example, got str"),
        ({"labels": {0: 1}}, TypeError, "got dict"),
        ({"labels": {0, 1}}, TypeError, "got set"),
        ({"labels": iter([0, 1])}, TypeError, "got list_iterator"),
        ({"labels": 3}, TypeError, "got int"),
        ({"labels": []}, ValueError, "should not be empty"),
        ({"labels": torch.zeros(0)}, ValueError, "should not be empty"),
        ({"labels": torch.eye(3)}, ValueError, r"one dimension, got Tensor of shape \(3, 3\)"),
        ({"labels": np.array(1)}, ValueError, r"one dimension, got ndarray of shape \(\)"),
        ({"labels": [0, [1]]}, TypeError, r"labels\[1\] should be hashable, as a class, got list"),
        ({"labels": [0, None]}, ValueError, r"labels\[1\] is None, which is no class"),
        ({"labels": [0.0, math.nan]}, ValueError, r"labels\[1\] is nan"),
        ({"labels": torch.tensor([0, math.nan])}, ValueError, r"labels\[1\] is nan"),
        ({"batch_size": 0}, ValueError, "batch_size should be 1 or more, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size should be an integer, got float"),
        ({"batch_size": True}, TypeError, "batch_size should be an integer, got bool"),
        ({"seed": None}, TypeError, "seed should be an integer, got NoneType"),
        ({"rank": 0}, ValueError, "rank and world_size belong together"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank should be below world_size 2, got 2"),
        ({"rank": -1, "world_size": 2}, ValueError, "rank should be 0 or more, got -1"),
        ({"rank": 0, "world_size": 5}, ValueError, "4 labels are too few for 1 batches of 2 in each of 5 processes"),
    ],
)
def test_wrong_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StratifiedBatchSampler(**{"labels": [0, 0, 1, 1], "batch_size": 2, **arguments})


def test_wrong_epochs() -> None:
    sampler = StratifiedBatchSampler([0, 1], 2)
    for epoch, error in ((-1, ValueError), (0.5, TypeError), (SimpleNamespace(), TypeError)):
        with pytest.raises(error, match="epoch should be"):
            sampler.set_epoch(epoch)
    assert len(list(sampler)) == 1
