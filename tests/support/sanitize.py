"""Every plan once, for a tool of compute-sanitizer to look at: forward and backward, in training and evaluation.

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
from problems import MODES, Problem, run_ours
from ways import WAYS, plan_of


def grids_first(ways: Iterable[Problem]) -> list[Problem]:
    """Puts grids first: all their blocks run at once, for which a tool's additions to kernels might leave no room."""
    return sorted(ways, key=lambda way: plan_of(way, "forward").team != "grid")


def main(ways: Iterable[Problem], device: str = "cuda") -> int:
    """Runs all of them, whatever becomes of the others; 1 if any failed."""
    torch.manual_seed(0)
    failed = 0
    for way in ways:
        for mode in (MODES[0], MODES[2]):
            try:
                result = run_ours(replace(way, mode=mode).arguments("cpu").to(device), backward=True)
                wrong = [name for name, t in result._asdict().items() if t is not None and not t.cpu().isfinite().all()]
            except RuntimeError as error:
                wrong = [str(error)]
            print(f"{way}, {mode}: {', '.join(wrong) or 'ok'}", flush=True)
            failed += bool(wrong)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(grids_first(WAYS)))
