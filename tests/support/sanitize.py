"""Runs every plan once, for a tool of compute-sanitizer to look at: forward and backward, in training and evaluation,
as one call, in stages, and in two statistic sets.

compute-sanitizer --kernel-name kns=batch_norm_kernel --error-exitcode 1 --tool memcheck \
    python tests/support/sanitize.py
"""

from __future__ import annotations

import os

# Each tensor is an allocation of its own, so that a step past its end is one too: before torch is loaded.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
from cases import MODES, Arguments, Case, run_ours
from staged import composed, fused
from torch import Tensor
from ways import WAYS, plan_of

from bn_ext.stages import merge_stats, stats


def grids_first(ways: Iterable[Case]) -> list[Case]:
    """Puts grids first: all their blocks run at once, for which a tool's additions to kernels might leave no room."""
    return sorted(ways, key=lambda way: plan_of(way, "forward").team != "grid")


def in_stages(a: Arguments) -> dict[str, Tensor]:
    """The stages, with rows of statistics merged and with sets that stay apart, and the sets in one call."""
    half = (a.input.size(0) + 1) // 2
    merged = merge_stats(stats(a.input, half))
    calls = {"stages": composed(a, None), "stages of sets": composed(a, half), "sets": fused(a, half)}
    parts = {f"{call} {name}": t for call, results in calls.items() for name, t in results.items()}
    return {"merged mean": merged.mean, "merged invstd": merged.invstd} | parts


def main(ways: Iterable[Case], device: str = "cuda") -> int:
    """Runs all of them, whatever becomes of the others; 1 if any failed."""
    torch.manual_seed(0)
    failed = 0
    for way in ways:
        for mode in (MODES[0], MODES[2]):
            try:
                a = replace(way, mode=mode).arguments("cpu").to(device)
                results = run_ours(a, backward=True)._asdict()
                if mode.training and a.input.size(0) > 2:
                    results |= in_stages(a)
                wrong = [name for name, t in results.items() if t is not None and not t.cpu().isfinite().all()]
            except RuntimeError as error:
                wrong = [str(error)]
            print(f"{way}, {mode}: {', '.join(wrong) or 'ok'}", flush=True)
            failed += bool(wrong)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(grids_first(WAYS)))
