"""Mini-batches in which every class has its share."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from bn_ext._processes import in_group


class StratifiedBatchSampler(Sampler[list[int]]):
    """Batches of indices in which every class has its share, for :class:`torch.utils.data.DataLoader`.

    An epoch gives every index once, over all processes together. A batch of s out of N examples has at least
    ⌊s · n / N⌋ and at most one more of a class of n examples. The places that these floors leave go to the classes of
    which most remainders are not yet dealt. Which examples meet, the order of the batches and the order within a batch
    are random, another for each epoch. Every batch has ``batch_size`` indices or fewer, and the sizes differ by one at
    most: there is no short last batch, whose statistics would be noisier than the others'.

    Use it if classes differ in their means and batches are so small that chance decides which classes a batch holds:
    statistics of a batch then differ less from batch to batch, and from the running statistics that evaluation uses.
    The variance of a batch's mean falls by the factor 1 - η², where η² is the part of the variance that lies between
    classes. Batch statistics regularize by the noise that they add (Ioffe & Szegedy 2015), and this noise becomes less.
    Ioffe & Szegedy found about 1 % on ImageNet by shuffling so that the same examples do not always meet, which this
    sampler does too; they did not stratify.

    Args:
        labels: the class of each example, in the order of the data set: a list, tuple, range, NumPy array, tensor of
            one dimension or any other sequence of hashable values.
        batch_size: the most indices of a batch, in one process.
        seed: of the random numbers; the same in all processes.
        rank, world_size: this process and the number of processes; those of :mod:`torch.distributed` if it is
            initialized and they are not given, else 0 and 1. Every process gets as many batches as the others.

    Shape:
        - a batch: a list of ``batch_size`` indices or fewer.

    Raises:
        TypeError: labels that are no sequence, or that are not hashable; a number that is no integer.
        ValueError: no labels, labels of other than one dimension, missing ones (None, NaN); a number out of range;
            fewer labels than the batches of one step.

    Example:
        >>> sampler = bn_ext.data.StratifiedBatchSampler(["cat"] * 6 + ["dog"] * 3, batch_size=3)
        >>> [sum(index < 6 for index in batch) for batch in sampler]  # cats in each batch
        [2, 2, 2]
    """

    def __init__(
        self,
        labels: Sequence[Any],
        batch_size: int,
        seed: int = 0,
        *,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        classes = _numbered(_listed(labels))
        self.batch_size = _integer("batch_size", batch_size, 1)
        self.seed = _integer("seed", seed)
        self.rank, self.world_size = _place(rank, world_size)
        self.epoch = 0
        examples = len(classes)
        self._steps = -(-examples // (self.batch_size * self.world_size))
        batches = self._steps * self.world_size
        if batches > examples:
            raise ValueError(
                f"StratifiedBatchSampler: {examples} labels are too few for {self._steps} batches of "
                f"{self.batch_size} in each of {self.world_size} processes"
            )
        self._sizes = [examples // batches + (batch < examples % batches) for batch in range(batches)]
        self._classes = torch.tensor(classes)
        # The places of an epoch, batch by batch, ordered by the class that each of them is for.
        self._places = torch.tensor(_dealt(classes, self._sizes)).argsort(stable=True)

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next. Without it each iteration is the epoch after the one before.

        Args:
            epoch: from 0 on; the same in all processes. To go on with a training, the epoch where it stopped.

        Raises:
            TypeError, ValueError: ``epoch`` is no integer, or negative.
        """
        self.epoch = _integer("epoch", epoch, 0)

    def __len__(self) -> int:
        """The number of batches in this process."""
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: the epoch counts when its first batch is asked for. DataLoader makes iterators that it drops.
        random = torch.Generator().manual_seed((1_000_003 * self.seed + self.epoch) % 2**32)
        self.epoch += 1
        shuffled = torch.randperm(len(self._classes), generator=random)
        indices = torch.empty_like(shuffled)
        indices[self._places] = shuffled[self._classes[shuffled].argsort(stable=True)]
        batches = indices.split(self._sizes)
        order = torch.randperm(len(batches), generator=random).tolist()
        for batch in order[self.rank :: self.world_size]:
            yield batches[batch][torch.randperm(self._sizes[batch], generator=random)].tolist()


def _dealt(classes: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The class of each place in an epoch, batch by batch.

    Each batch takes a class at most once beyond the floor of its share. Because the places left in a batch go to the
    classes with most examples left, all places and all examples match in the end (Gale & Ryser).
    """
    counts, total = Counter(classes), len(classes)
    floors = {size: {c: floor for c, n in counts.items() if (floor := n * size // total)} for size in set(sizes)}
    left = dict(counts)
    for size, times in Counter(sizes).items():
        for c, floor in floors[size].items():
            left[c] -= times * floor
    largest = [(-n, c) for c, n in left.items() if n]
    heapq.heapify(largest)
    places: list[int] = []
    for size in sizes:
        places += chain.from_iterable(repeat(c, floor) for c, floor in floors[size].items())
        taken = [heapq.heappop(largest) for _ in range(size - sum(floors[size].values()))]
        places += [c for _, c in taken]
        for negative, c in taken:
            if negative < -1:
                heapq.heappush(largest, (negative + 1, c))
    return places


# ------------------------------------------------------------------------------------------ arguments


def _listed(labels: Any) -> list[Any]:
    kind = type(labels).__name__
    ordered = hasattr(labels, "__len__") and hasattr(labels, "__getitem__")
    if not ordered or isinstance(labels, (str, bytes, Mapping)):
        raise TypeError(
            f"StratifiedBatchSampler: labels should be a sequence with the class of each example, got {kind}"
        )
    shape = getattr(labels, "shape", None)
    if shape is not None and len(shape) != 1:
        raise ValueError(f"StratifiedBatchSampler: labels should have one dimension, got {kind} of shape {(*shape,)}")
    if not len(labels):
        raise ValueError("StratifiedBatchSampler: labels should not be empty")
    return labels.tolist() if hasattr(labels, "tolist") else list(labels)


def _numbered(labels: list[Any]) -> list[int]:
    """The number of each label's class, by first appearance: the same in all processes."""
    numbers: dict[Any, int] = {}
    found = []
    for i, label in enumerate(labels):
        if isinstance(label, Tensor) and label.dim() == 0:
            label = label.item()  # noqa: PLW2901 - equal tensors have different hashes
        try:
            found.append(numbers.setdefault(label, len(numbers)))
        except TypeError:
            kind = type(label).__name__
            raise TypeError(f"StratifiedBatchSampler: labels[{i}] should be hashable, as a class, got {kind}") from None
        if label is None or label != label:  # noqa: PLR0124
            raise ValueError(f"StratifiedBatchSampler: labels[{i}] is {label}, which is no class")
    return found


def _integer(name: str, given: Any, least: int | None = None) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise TypeError(f"StratifiedBatchSampler: {name} should be an integer, got {type(given).__name__}")
    number = int(given)
    if least is not None and number < least:
        raise ValueError(f"StratifiedBatchSampler: {name} should be {least} or more, got {number}")
    return number


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """The number of this process, and of all processes."""
    if (rank is None) != (world_size is None):
        raise ValueError("StratifiedBatchSampler: rank and world_size belong together, got one of them")
    if rank is None or world_size is None:
        return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)
    rank, world_size = _integer("rank", rank, 0), _integer("world_size", world_size, 1)
    if rank >= world_size:
        raise ValueError(f"StratifiedBatchSampler: rank should be below world_size {world_size}, got {rank}")
    return rank, world_size
