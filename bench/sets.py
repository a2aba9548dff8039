"""``python -m bench.sets``: training by other sets of values, beside plain batch norm and beside code without them.

Each call is a forward and a backward. Results are compared before anything is timed; the calls of a case are taken in
turn.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import heap
from bench.workloads import DTYPES, LAYOUTS, layouts, sizes_of
from bn_ext.functional import batch_norm
from bn_ext.tools.timing import interleave, ratios

VIRTUAL = 32
SHAPES = {
    "virtual": ("256x64x32x32", "256x256x14x14", "256x512x7x7", "256x512"),
    "mask": ("32x256x1000", "32x64x56x56"),
}
PLAIN = "plain"
FIELDS = {"over_plain": "time / time of plain batch norm of the same tensor, median over the rounds"}

Row = dict[str, Any]
Function = Callable[[Tensor], Tensor]


def normalized(x: Tensor, **options: Any) -> Tensor:
    running = torch.zeros(x.size(1)), torch.ones(x.size(1))
    return batch_norm(x, *running, torch.ones(x.size(1)), torch.zeros(x.size(1)), training=True, **options)


def by_torch(x: Tensor) -> Tensor:
    running = torch.zeros(x.size(1)), torch.ones(x.size(1))
    return F.batch_norm(x, *running, torch.ones(x.size(1)), torch.zeros(x.size(1)), training=True)


def chunks(function: Function, x: Tensor) -> Tensor:
    """Virtual batches by one call each."""
    return torch.cat([function(part) for part in x.split(VIRTUAL)])


def padding(x: Tensor) -> Tensor:
    """A mask of which half is padding: the ends of sequences of many lengths, or the right halves of images."""
    last = x.size(-1)
    lengths = torch.linspace(1, last, len(x)).long() if x.dim() == 3 else torch.full((len(x),), last // 2)
    mask = torch.arange(last) < lengths.view(-1, *[1] * (x.dim() - 2))
    return mask.expand(len(x), *x.shape[2:]).contiguous()


def cut_out(x: Tensor, mask: Tensor) -> Tensor:
    """A mask without the argument: the values that count go through a batch norm of their own."""
    rows = x.movedim(1, -1)
    return torch.zeros_like(rows).masked_scatter(mask.unsqueeze(-1), normalized(rows[mask])).movedim(-1, 1)


def cases(kind: str, x: Tensor) -> dict[str, Function]:
    if kind == "virtual":
        return {
            PLAIN: normalized,
            "virtual": partial(normalized, virtual_batch_size=VIRTUAL),
            "chunks": partial(chunks, normalized),
            "torch's chunks": partial(chunks, by_torch),
        }
    mask = padding(x)
    return {PLAIN: normalized, "mask": partial(normalized, mask=mask), "cut out": partial(cut_out, mask=mask)}


def step(function: Function, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    leaf = x.detach().requires_grad_()

    def call() -> Tensor:
        return torch.autograd.grad(function(leaf), leaf, dy)[0]

    return call


def measure(kind: str, shape: str, layout: str, dtype: str, seconds: float, rounds: int) -> list[Row]:
    x, dy = torch.randn(2, *sizes_of(shape)).to(DTYPES[dtype])
    if layout == "channels_last":
        x, dy = (t.to(memory_format=LAYOUTS[layout]) for t in (x, dy))
    calls: dict[str, Callable[[], object]] = {n: step(function, x, dy) for n, function in cases(kind, x).items()}
    gradients = [step(function, x, dy)() for function in cases(kind, x).values()]
    bound = (1e-4 if dtype == "float32" else 0.05) * gradients[-1].abs().max().item()
    for gradient in gradients[1:-1]:
        torch.testing.assert_close(gradient, gradients[-1], rtol=0, atol=bound)
    samples, _ = interleave(calls, seconds, rounds)
    case = {"kind": kind, "shape": shape, "layout": layout, "dtype": dtype}
    return [
        {**case, "way": way, "median_ms": 1e3 * median(samples[way]), "over_plain": median(ratios(samples, way, PLAIN))}
        for way in calls
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    heap.add_option(parser)
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--shapes", nargs="+", help="in place of those of each kind")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for kind in options.kinds:
        for shape in options.shapes or SHAPES[kind]:
            for layout in layouts(shape):
                for dtype in options.dtypes:
                    found = measure(kind, shape, layout, dtype, options.seconds, options.rounds)
                    of_plain = ", ".join(f"{row['way']} {row['over_plain']:.2f}" for row in found[1:])
                    print(f"{shape} {layout} {dtype}: {of_plain} of plain, {found[0]['median_ms']:.2f} ms", flush=True)
                    rows += found
    if options.out is not None:
        record = {"fields": FIELDS, "heap": options.heap, "threads": torch.get_num_threads(), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    heap.restart(heap.chosen(sys.argv[1:]))
    sys.exit(main())
