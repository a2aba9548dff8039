"""The demo says of its runs what they showed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the examples are no part of the installed package

import picture
import report
import speed
from findings import Arrival, Findings
from matplotlib.figure import Figure
from training import Run

STEPS = [10, 20, 30, 40, 50]
CHANCE = [10.0] * 5
SLOW = [10.0, 30.0, 60.0, 90.0, 90.0]  # means of three: 33, 60, 80
FAST = [60.0, 90.0, 90.0, 90.0, 93.0]  # 80, 90, 91
FASTER = [90.0, 90.0, 90.0, 60.0, 60.0]  # 90, 80, 70
LUCKY = [10.0, 10.0, 99.0, 10.0, 10.0]  # 40 throughout


def run(norm: str, accuracy: Sequence[float], rate: float = 1.0, seed: int = 0, depth: int = 3, ms: float = 1) -> Run:
    return Run(depth, norm, rate, seed, [ms / 1e3] * 3, STEPS, list(accuracy))


def runs(plain: Sequence[float], ours: Sequence[float], **options: float) -> list[Run]:
    """With torch's a millisecond a step, ours a half."""
    return [run("none", plain, **options), run("torch", ours, **options), run("bn_ext", ours, ms=0.5, **options)]


def test_best_rates_race_to_the_plain_best() -> None:
    findings = Findings([*runs(SLOW, FAST, rate=0.1), *runs(CHANCE, FASTER, rate=1.0)])
    race = findings.race(3)
    assert race is not None and race.goal == pytest.approx(80)
    assert race.arrivals["none"] == Arrival(40, 0.1)
    assert race.arrivals["bn_ext"] == race.arrivals["torch"] == Arrival(20, 0.1)  # of 20 at both rates, the lower rate
    assert report.race_line(findings, 3, race) == (
        "3 layers: to 80.0 %, the best without batch norm, it takes 20 steps at rate 0.1 instead of 40 at rate 0.1"
    )


def test_race_is_run_by_the_mean_of_the_seeds() -> None:
    findings = Findings([*runs(SLOW, FAST, seed=0), *runs(SLOW, CHANCE, seed=1)])
    race = findings.race(3)
    assert race is not None and set(race.arrivals) == {"none"}
    assert "is not reached, best 50.5 % at rate 1" in report.race_line(findings, 3, race)
    assert report.table(findings).count("not reached") == 2


def test_one_lucky_evaluation_wins_nothing() -> None:
    race = Findings(runs(SLOW, LUCKY)).race(3)
    assert race is not None and set(race.arrivals) == {"none"}


def test_no_race_where_nothing_is_learnt() -> None:
    findings = Findings([*runs(CHANCE, FAST, depth=6), *runs(SLOW, FAST)])
    assert findings.race(6) is None and findings.race(3) is not None
    lines = report.verdict(findings, {"x": 1e-12}, TIMES)
    assert [line[:9] for line in lines[:3]] == ["3 layers:", "6 layers:", "3 layers:"]


def test_rates_are_counted() -> None:
    findings = Findings([*runs(SLOW, FAST, rate=0.1), *runs(CHANCE, FASTER, rate=1.0), *runs(LUCKY, FAST, rate=3.0)])
    assert report.rates_line(findings, 3) == (
        "3 layers: of 3 learning rates from 0.1 to 3, 2 (70.0 to 91.0 %) lead to 80 % and more with batch norm, "
        "1 (10.0 to 80.0 %) without"
    )


def test_table_has_mean_deviation_and_holes() -> None:
    findings = Findings([*runs(SLOW, FAST, seed=0), *runs(CHANCE, FAST, seed=1), *runs(CHANCE, FAST, rate=3, depth=6)])
    seeds, head, *rows = report.table(findings).splitlines()
    assert seeds.endswith("seeds: 1 to 2")
    assert " ".join(head.split()).startswith("layers batch norm rate 1 rate 3 best")
    assert rows[0].split()[:5] == ["3", "none", "45.0", "±", "49.5"]  # of 80 and 10
    assert rows[2].split()[-1] == "0.50" and rows[1].split()[-1] == "1.00"
    assert rows[3].split()[:5] == ["6", "none", "10.0", "10.0", "plain"]  # nothing for rate 1


@pytest.mark.parametrize(
    ("better", "words"), [((0.0, 2.0, 1.0, 1.0), "beyond"), ((-1.0, 1.0, 1.0, -1.0), "within noise")]
)
def test_accuracies_are_compared_in_pairs(better: Sequence[float], words: str) -> None:
    pairs = []
    for seed, difference in enumerate(better):
        theirs = [value + 5 * seed for value in SLOW]
        pairs += [run("torch", theirs, seed=seed), run("bn_ext", [value + difference for value in theirs], seed=seed)]
    mean, half, count = Findings(pairs[::-1]).accuracy_difference()
    expected = torch.tensor(better, dtype=torch.float64)
    assert (mean, count) == (pytest.approx(expected.mean().item()), 4)
    assert half == pytest.approx(expected.std().item())  # twice it, by the root of 4
    line = report.agreement_line(Findings(pairs), 2e-12)
    assert words in line and "at most 2e-12" in line and f"{mean:+.2f} ± {half:.2f} points" in line


TIMES = {
    True: speed.Times([3.0, 3.0, 3.0], [2.0, 2.0, 1.0]),
    False: speed.Times([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
}


def test_speed_says_how_many_times_as_fast() -> None:
    step, block, rest = report.speed_lines(Findings(runs(SLOW, FAST)), TIMES)
    assert step.endswith("2.00x as fast as torch's with 3 layers")
    assert block.endswith("1.50x as fast as torch's (half of the rounds 1.50x to 2.25x)")
    assert "without its two convolutions: 0.50x" in rest


def test_blocks_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
            return self.block(x)

    monkeypatch.setattr(speed.bn_ext, "fuse", Slow)
    monkeypatch.setattr(speed, "SHAPE", (2, 4, 8, 8))
    monkeypatch.setattr(speed, "ROUNDS", 3)
    times = speed.block_times(convolutions=False)
    assert len(times.torch) == len(times.bn_ext) == 3
    assert times.times_as_fast < 0.5


def test_titles_say_what_the_panels_show(tmp_path: Path) -> None:
    findings = Findings([*runs(SLOW, FAST), *runs(CHANCE, FAST, depth=6)])
    for depth, rates, way in (
        (
            3,
            "3 layers: 1 of 1 learning rates work, without batch norm 1",
            "3 layers: 80.0 % after 20 steps instead of 40",
        ),
        (
            6,
            "6 layers: 1 of 1 learning rates work, without batch norm 0",
            "6 layers: 91.0 % at best, without batch norm 10.0 %",
        ),
    ):
        above, below = Figure().subplots(2)
        picture.draw_rates(above, findings, depth)
        picture.draw_steps(below, findings, depth)
        assert [axes.get_title(loc="left") for axes in (above, below)] == [rates, way]
