"""The findings in words: a table, and a verdict that says what happened, hoped for or not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import stacks
from findings import LEARNT, Arrival, Findings, Race, Spread
from speed import SHAPE, Times


def table(findings: Findings) -> str:
    rates = [f"rate {rate:g}" for rate in findings.rates]
    rows = [("layers", "batch norm", *rates, "best", "steps to plain's best", "ms a step")]
    for depth in findings.depths:
        race, times = findings.race(depth), findings.step_times(depth)
        for norm in stacks.NORMS:
            curves = findings.curves(depth, norm)
            finals = [cell(curves[rate].final) if rate in curves else "" for rate in findings.rates]
            best, _ = findings.best(depth, norm)
            rows.append((str(depth), norm, *finals, f"{best:.1f}", steps(race, norm), f"{1e3 * times[norm]:.2f}"))
    columns = [
        [f"{text:{'<' if index < 2 else '>'}{max(map(len, column))}}" for text in column]
        for index, column in enumerate(zip(*rows))
    ]
    seeds = f"Accuracy on test digits in percent: mean ± standard deviation; seeds: {findings.seeds}"
    return "\n".join([seeds, *("  ".join(row) for row in zip(*columns))])


def cell(final: Spread) -> str:
    return f"{final.mean:.1f}" if math.isnan(final.deviation) else f"{final.mean:.1f} ± {final.deviation:.1f}"


def steps(race: Race | None, norm: str) -> str:
    if race is None:
        return f"plain below {LEARNT:.0f} %"
    return arrival(race.arrivals[norm]) if norm in race.arrivals else "not reached"


def arrival(at: Arrival) -> str:
    return f"{at.steps} (rate {at.rate:g})"


def verdict(findings: Findings, differences: Mapping[str, float], times: Mapping[bool, Times]) -> list[str]:
    """Lines. ``differences`` of losses by pair of networks; ``times`` of the residual block by: with convolutions."""
    rates = [rates_line(findings, depth) for depth in findings.depths]
    races = [race_line(findings, depth, race) for depth in findings.depths if (race := findings.race(depth))]
    return [*rates, *races, agreement_line(findings, max(differences.values())), *speed_lines(findings, times)]


def rates_line(findings: Findings, depth: int) -> str:
    def outcome(norm: str) -> str:
        finals = [curve.final.mean for curve in findings.curves(depth, norm).values()]
        return f"{len(findings.learnt(depth, norm))} ({min(finals):.1f} to {max(finals):.1f} %)"

    rates = findings.rates
    return (
        f"{depth} layers: of {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g}, "
        f"{outcome('bn_ext')} lead to {LEARNT:.0f} % and more with batch norm, {outcome('none')} without"
    )


def race_line(findings: Findings, depth: int, race: Race) -> str:
    start = f"{depth} layers: to {race.goal:.1f} %, the best without batch norm, it takes"
    plain = race.arrivals["none"]
    if ours := race.arrivals.get("bn_ext"):
        return f"{start} {ours.steps} steps at rate {ours.rate:g} instead of {plain.steps} at rate {plain.rate:g}"
    best, rate = findings.best(depth, "bn_ext")
    return f"{start} {plain.steps} steps; with batch norm it is not reached, best {best:.1f} % at rate {rate:g}"


def agreement_line(findings: Findings, difference: float) -> str:
    mean, half, pairs = findings.accuracy_difference()
    noise = "within noise" if abs(mean) <= half else "beyond what noise gives in 19 of 20 runs"
    return (
        f"bn_ext beside torch: losses in float64 differ by at most {difference:.0e} of their value; "
        f"accuracies by {mean:+.2f} ± {half:.2f} points (95 % interval of {pairs} pairs), {noise}"
    )


def speed_lines(findings: Findings, times: Mapping[bool, Times]) -> list[str]:
    def faster(both: Times) -> str:
        low, high = both.middle_half
        return f"{both.times_as_fast:.2f}x as fast as torch's (half of the rounds {low:.2f}x to {high:.2f}x)"

    steps = {depth: findings.step_times(depth) for depth in findings.depths}
    ratios = [
        f"{both['torch'] / both['bn_ext']:.2f}x as fast as torch's with {depth} layers" for depth, both in steps.items()
    ]
    return [
        f"a training step of the sigmoids: {', '.join(ratios)}",
        f"a residual block of {'x'.join(map(str, SHAPE))}, fused, forward and backward: {faster(times[True])}",
        f"the same block without its two convolutions: {faster(times[False])}",
    ]
