"""Time on a GPU alone, of calls whose tensors no cache holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from bn_ext.tools.timing import interleave

COPIED = 1 << 30  # bytes, past every cache


class GpuClock:
    """Takes samples of GPU time. The GPU sleeps until a sample's calls are queued: it never waits for the host."""

    CYCLES = 2e9  # a second, of the fastest GPU
    FIRST = 2e-3  # seconds that calls not known yet are given
    MARGIN = 2.0
    ATTEMPTS = 5

    def __init__(self) -> None:
        self._queueing: dict[int, float] = {}
        self.late: Counter[int] = Counter()  # by call: the samples in which the GPU waited for the host nevertheless

    def sample(self, call: Callable[[], object], times: int) -> float:
        """Seconds per call over ``times`` calls."""
        for _ in range(self.ATTEMPTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(self._queueing.get(id(call), self.FIRST) * self.CYCLES))
            start.record()
            begin = perf_counter()
            for _ in range(times):
                call()
            self._queueing[id(call)] = self.MARGIN * (perf_counter() - begin)
            in_time = not start.query()
            end.record()
            end.synchronize()
            if in_time:
                break
        else:
            self.late[id(call)] += 1
        return start.elapsed_time(end) / 1e3 / times


def timed(
    calls: dict[str, Callable[[], object]], seconds: float, rounds: int, late: Counter[str]
) -> tuple[dict[str, list[float]], int]:
    """Samples of calls, each a turn over the sets, by GPU time. Counts the ``late`` samples of each call."""
    clock = GpuClock()
    samples = interleave(calls, seconds, rounds, clock.sample, shortest=0)
    late.update({name: clock.late[id(call)] for name, call in calls.items()})
    return samples


def sets_past(cache: int, tensor: int) -> int:
    """The number of tensors of this size that are together twice as large as the cache, at least two."""
    return max(2, math.ceil(2 * cache / tensor))


def copy_rate(device: str = "cuda") -> float:
    """Bytes that a plain copy of a large tensor reads and writes in a second, the best of some samples."""
    source = torch.empty(COPIED // 4, device=device).normal_()
    copy = partial(torch.empty_like(source).copy_, source)
    clock = GpuClock()
    return 2 * source.nbytes / min(clock.sample(copy, 5) for _ in range(5))
