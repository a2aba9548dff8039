"""Every plan once, for a tool of compute-sanitizer to look at: forward and backward, in training and evaluation.

compute-sanitizer --kernel-name kns=batch_norm_kernel --error-exitcode 1 --tool memcheck python tests/sanitize.py
"""

from __future__ import annotations

import os

# Each tensor is an allocation of its own, so that a step past its end is one too: before torch is loaded.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

from dataclasses import replace

import torch
from problems import MODES, run_ours
from ways import WAYS

torch.manual_seed(0)
for way in WAYS:
    for mode in (MODES[0], MODES[2]):
        result = run_ours(replace(way, mode=mode).arguments("cpu").to("cuda"), backward=True)
        assert all(bool(t.cpu().isfinite().all()) for t in result), f"{way}, {mode}"
        print(way, mode, flush=True)
