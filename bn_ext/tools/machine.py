"""The machine that something is measured on, and the load that other processes put on it meanwhile."""

from __future__ import annotations

import os
import time

import torch

from bn_ext import _C

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of dimensions
_BUSY = 0.1  # the part of the cores' time that others may take before figures are called noisy
_STAT = "/proc/stat"
_IDLE, _IOWAIT, _GUESTS = 3, 4, 8  # fields of a processor's line; those of guests are in the others already


def where(device: torch.device) -> str:
    """The device in words, for the CPU with what matters for speed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        count = torch.get_num_threads()
        return f"{count} thread{'s' * (count > 1)}, {_C.instruction_set()}"
    return str(device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def described(tensor: torch.Tensor) -> str:
    """Sizes, dtype and layout."""
    format = CHANNELS_LAST.get(tensor.dim())
    is_last = format is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=format)
    return f"{'x'.join(map(str, tensor.shape))} {name_of(tensor.dtype)}{' channels last' * is_last}"


def busy(cores: set[int]) -> float | None:
    """Seconds for which ``cores`` were not idle since the system started; None where it does not tell."""
    try:
        with open(_STAT) as file:
            lines = dict(line.split(maxsplit=1) for line in file if line.startswith("cpu"))
        fields = [[int(field) for field in lines[f"cpu{core}"].split()[:_GUESTS]] for core in cores]
    except (OSError, KeyError, ValueError):
        return None
    ticks = sum(sum(core) - core[_IDLE] - core[_IOWAIT] for core in fields)
    return ticks / os.sysconf("SC_CLK_TCK")


class Others:
    """How busy other processes keep this one's cores, since the object was made."""

    def __init__(self) -> None:
        self.cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self.start = self._now()

    def _now(self) -> tuple[float, float] | None:
        seconds = busy(self.cores)
        return None if seconds is None else (time.perf_counter(), seconds - time.process_time())

    def share(self) -> float:
        """The part of these cores' time that others took so far, 0 to 1; 0 where the system does not tell."""
        now = self._now()
        if now is None or self.start is None or not self.cores:
            return 0.0
        elapsed, taken = (one - other for one, other in zip(now, self.start))
        return min(1.0, max(0.0, taken / (elapsed * len(self.cores)))) if elapsed > 0 else 0.0

    def notes(self) -> list[str]:
        """A line that says so, if others were busy enough to disturb what was measured."""
        share = self.share()
        return [f"Other processes took {100 * share:.0f} % of the cores' time: expect noise."] if share > _BUSY else []
