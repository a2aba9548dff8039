"""The trainings showed this: accuracies over seeds, best rates, steps to an accuracy, torch's and ours compared."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import stacks
from training import Run

LEARNT = 80.0  # percent, far from the 10 of chance
SMOOTHED = 3  # evaluations of which a mean is taken, as one wanders


class Spread(NamedTuple):
    mean: float
    deviation: float  # nan for a single value


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan)


class Curve(NamedTuple):
    """The accuracies of several seeds, each the mean of the evaluations around a step."""

    steps: list[int]
    seeds: list[list[float]]

    @property
    def mean(self) -> list[float]:
        return [statistics.fmean(values) for values in zip(*self.seeds)]

    @property
    def final(self) -> Spread:
        return spread([accuracy[-1] for accuracy in self.seeds])

    def steps_to(self, accuracy: float) -> int | None:
        """At which the mean over the seeds first reaches it."""
        return next((step for step, reached in zip(self.steps, self.mean) if reached >= accuracy), None)


class Arrival(NamedTuple):
    steps: int
    rate: float  # the one that takes the fewest steps


class Race(NamedTuple):
    goal: float
    arrivals: dict[str, Arrival]  # of the norms that reach it


def smoothed(values: Sequence[float]) -> list[float]:
    window = min(SMOOTHED, len(values))
    return [statistics.fmean(values[i : i + window]) for i in range(len(values) - window + 1)]


class Findings:
    """All of what is asked of the runs, complete or not."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self.depths = sorted({run.depth for run in self.runs})
        self.rates = sorted({run.rate for run in self.runs})

    @property
    def seeds(self) -> str:
        """Their number, which differs where the runs are not complete."""
        counts = Counter((run.depth, run.norm, run.rate) for run in self.runs).values()
        low, high = min(counts), max(counts)
        return f"{low}" if low == high else f"{low} to {high}"

    def curve(self, depth: int, norm: str, rate: float) -> Curve | None:
        """None where there is no such run."""
        runs = [run for run in self.runs if (run.depth, run.norm, run.rate) == (depth, norm, rate)]
        if not runs:
            return None
        steps = runs[0].steps
        window = min(SMOOTHED, len(steps))
        middles = steps[window // 2 : len(steps) - (window - 1) // 2]
        return Curve(middles, [smoothed(run.accuracy) for run in runs])

    def curves(self, depth: int, norm: str) -> dict[float, Curve]:
        """By rate."""
        curves = {rate: self.curve(depth, norm, rate) for rate in self.rates}
        return {rate: curve for rate, curve in curves.items() if curve}

    def learnt(self, depth: int, norm: str) -> list[float]:
        """The rates at which it ends at 80 % or more."""
        return [rate for rate, curve in self.curves(depth, norm).items() if curve.final.mean >= LEARNT]

    def best(self, depth: int, norm: str) -> tuple[float, float]:
        """The best accuracy of the mean over seeds, at any rate and step, and that rate."""
        return max((max(curve.mean), rate) for rate, curve in self.curves(depth, norm).items())

    def race(self, depth: int) -> Race | None:
        """To the best accuracy without batch norm; None where nothing was learnt without."""
        if not self.learnt(depth, "none"):
            return None
        goal, _ = self.best(depth, "none")
        arrivals: dict[str, Arrival] = {}
        for norm in stacks.NORMS:
            steps = ((curve.steps_to(goal), rate) for rate, curve in self.curves(depth, norm).items())
            if reached := [Arrival(step, rate) for step, rate in steps if step is not None]:
                arrivals[norm] = min(reached)
        return Race(goal, arrivals)

    def accuracy_difference(self) -> tuple[float, float, int]:
        """Of bn_ext's final accuracies less torch's: the mean, the half of its 95 % interval, the number of pairs."""
        final = {(r.depth, r.rate, r.seed, r.norm): smoothed(r.accuracy)[-1] for r in self.runs}
        differences = [
            accuracy - final[depth, rate, seed, "torch"]
            for (depth, rate, seed, norm), accuracy in final.items()
            if norm == "bn_ext"
        ]
        mean, deviation = spread(differences)
        return mean, 2 * deviation / len(differences) ** 0.5, len(differences)

    def step_times(self, depth: int) -> dict[str, float]:
        """By norm, the median seconds of a step."""
        seconds: dict[str, list[float]] = {}
        for run in self.runs:
            if run.depth == depth:
                seconds.setdefault(run.norm, []).extend(run.seconds)
        return {norm: statistics.median(values) for norm, values in seconds.items()}
