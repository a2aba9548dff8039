"""Torch's profiler tells the memory that a step takes, and the part of its time that our operators take."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_LOG = b"USDT:"
_STEPS = 3


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keeps Python from freeing cycles: memory of an earlier step would count as freed by this one."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
def allocated(step: Callable[[], object], device: str) -> tuple[int, int]:
    """Bytes that ``step`` leaves in what it returns, and the most that it had at a time."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        left = step()
        levels = [torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before]
    else:
        with _without_log(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            left = step()
        events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted(
            (e.start_ns(), number, e.nbytes()) for number, e in enumerate(events) if e.name() == "[memory]"
        )
        levels = list(accumulate((nbytes for *_, nbytes in changes), initial=0))
    del left
    return levels[-1], max(levels)


def share_of_ours(step: Callable[[], object], device: str) -> float:
    """The part of the time of ``step`` that our operators take, 0 to 1."""
    on_gpu = torch.device(device).type == "cuda"
    with _without_log(), profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiled:
        for _ in range(_STEPS):
            with record_function("step"):
                step()
    events = profiled.events() or []
    ours = [event for event in events if _is_ours(event) and not _is_ours(event.cpu_parent)]
    if on_gpu:  # where the backward runs in a thread of its own
        taken, total = sum(e.device_time_total for e in ours), sum(e.self_device_time_total for e in events)
    else:
        taken, total = sum(e.cpu_time_total for e in ours), sum(e.cpu_time_total for e in events if e.name == "step")
    return taken / total if total else 0.0  # a GPU may keep its times to itself


def _is_ours(event: Any) -> bool:
    return event is not None and event.name.startswith("bn_ext::")


@contextmanager
def _without_log() -> Iterator[None]:
    """Suppresses the lines, on standard error at any log level, in which the profiler says that it starts and stops."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            os.close(before)
            written.seek(0)
            os.write(2, b"".join(line for line in written if not line.startswith(_LOG)))
