"""Several calls timed in turn, so that whatever disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable
from statistics import median, quantiles
from time import perf_counter

import torch

SHORTEST_SAMPLE = 2e-3  # seconds, about; shorter calls are repeated within a sample
MOST_CALLS = 200  # in one sample
WARM_UP = 3


Sample = Callable[[Callable[[], object], int], float]


def sample(call: Callable[[], object], times: int) -> float:
    """Seconds per call over ``times`` calls."""
    repeat = range(times)
    start = perf_counter()
    for _ in repeat:
        call()
    return (perf_counter() - start) / times


def sampler(device: torch.device) -> Sample:
    """``sample`` for calls that a GPU goes on with after they return."""
    if device.type != "cuda":
        return sample

    def synchronized(call: Callable[[], object], times: int) -> float:
        torch.cuda.synchronize(device)
        start = perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize(device)
        return (perf_counter() - start) / times

    return synchronized


def interleave(
    calls: dict[str, Callable[[], object]],
    seconds: float,
    rounds: int,
    sample: Sample = sample,
    shortest: float = SHORTEST_SAMPLE,
) -> tuple[dict[str, list[float]], int]:
    """Samples of each call, entry i of all of them taken in round i, and the calls in one sample.

    Runs at least ``rounds`` rounds and at least ``seconds``. The order changes from round to round: what
    a call finds in the caches depends on who ran before it.
    """
    order = list(calls)
    usual = median(min(sample(calls[name], 1) for _ in range(WARM_UP)) for name in order)
    times = min(MOST_CALLS, max(1, math.ceil(shortest / usual)))
    samples: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + seconds
        while len(samples[order[0]]) < rounds or perf_counter() < end:
            shuffle(order)
            for name in order:
                samples[name].append(sample(calls[name], times))
    finally:
        gc.enable()
    return samples, times


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    fifths = quantiles(values, n=5, method="inclusive")
    return fifths[0], median(values), fifths[-1]


def ratios(samples: dict[str, list[float]], numerator: str, denominator: str) -> list[float]:
    """The ratio of two calls in each round."""
    return [a / b for a, b in zip(samples[numerator], samples[denominator], strict=True)]


def duration(seconds: float) -> str:
    """In three digits and a unit."""
    scale, unit = next((unit for unit in ((1, "s"), (1e-3, "ms")) if seconds >= unit[0]), (1e-6, "µs"))
    return f"{seconds / scale:.3g} {unit}"
