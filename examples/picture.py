"""The findings as a picture: each title says what its panel shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from findings import LEARNT, Findings
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

COLORS = {"none": "#d1495b", "torch": "#9cc3e6", "bn_ext": "#1b4f8c"}
WIDTHS = {"none": 2.0, "torch": 6.0, "bn_ext": 2.0}  # ours is drawn on top of torch's
WITH = "with batch norm: bn_ext's on top of torch's"
WITHOUT = "without batch norm"


def draw(findings: Findings, path: Path) -> None:
    """A column for each depth: the accuracy in the end at each learning rate, and the way to it at the best."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)  # inches
    figure = Figure(figsize=(13, 8), layout=layout)
    panels = figure.subplots(2, len(findings.depths), squeeze=False, sharey=True)
    for above, below, depth in zip(*panels, findings.depths):
        draw_rates(above, findings, depth)
        draw_steps(below, findings, depth)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
        axes.set(ylim=(0, 106), yticks=range(0, 101, 20))
        axes.annotate(WITH, (0.02, 0.99), xycoords="axes fraction", va="top", color=COLORS["bn_ext"], weight="bold")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy on test digits, %")
    caption = (
        f"Lines: mean of the seeds ({findings.seeds}); bands: from the lowest to the highest. "
        f"A learning rate works if it leads to {LEARNT:.0f} % and more."
    )
    figure.supxlabel(caption, x=0.99, ha="right", fontsize="small", color="#555555")
    figure.savefig(path, format="png", dpi=130)


def draw_rates(axes: Axes, findings: Findings, depth: int) -> None:
    for norm in WIDTHS:
        curves = findings.curves(depth, norm)
        draw_line(axes, list(curves), [[seed[-1] for seed in curve.seeds] for curve in curves.values()], norm)
        if norm == "none":
            rate, curve = next(iter(curves.items()))
            label(axes, rate, curve.final.mean, (0, -14))
    ours, plain = (len(findings.learnt(depth, norm)) for norm in ("bn_ext", "none"))
    title(axes, f"{depth} layers: {ours} of {len(findings.rates)} learning rates work, without batch norm {plain}")
    log_axis(axes, "learning rate", ticks=(1, 3))


def draw_steps(axes: Axes, findings: Findings, depth: int) -> None:
    """Without batch norm at the rate of the best accuracy; with it at the one that reaches this first."""
    race = findings.race(depth)
    (goal, plain_rate), (best, best_rate) = (findings.best(depth, norm) for norm in ("none", "bn_ext"))
    reached = race.arrivals.get("bn_ext") if race else None
    for norm in WIDTHS:
        rate = plain_rate if norm == "none" else reached.rate if reached else best_rate
        curve = findings.curves(depth, norm)[rate]
        draw_line(axes, curve.steps, list(zip(*curve.seeds)), norm)
        if norm == "none":
            half = next((i for i, accuracy in enumerate(curve.mean) if accuracy >= 50), 0)
            label(axes, curve.steps[half], curve.mean[half], (8, -14))
    if race and reached:
        steps = [reached.steps, race.arrivals["none"].steps]
        axes.plot(steps, [goal, goal], color="#333333", linewidth=1, marker="o", markersize=5)
        title(axes, f"{depth} layers: {goal:.1f} % after {steps[0]} steps instead of {steps[1]}")
    else:
        title(axes, f"{depth} layers: {best:.1f} % at best, without batch norm {goal:.1f} %")
    log_axis(axes, "training step, each side at its best learning rate", ticks=(1, 2, 5))


def draw_line(axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], norm: str) -> None:
    """``seeds``: the accuracies at each x."""
    low, high, mean = ([of(y) for y in seeds] for of in (min, max, fmean))
    axes.fill_between(x, low, high, color=COLORS[norm], alpha=0.2, linewidth=0)
    axes.plot(x, mean, color=COLORS[norm], linewidth=WIDTHS[norm], solid_capstyle="round")


def label(axes: Axes, x: float, y: float, offset: tuple[float, float]) -> None:
    axes.annotate(WITHOUT, (x, y), offset, textcoords="offset points", va="center", color=COLORS["none"], weight="bold")


def log_axis(axes: Axes, name: str, ticks: Sequence[float]) -> None:
    """With these ticks, and ten times them, and so on."""
    axes.set(xscale="log", xlabel=name)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", weight="bold")
