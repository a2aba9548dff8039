"""The random states of Python, NumPy and torch, kept as one."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch


def random_states() -> Callable[[], None]:
    """Notes all random states. The function that it returns restores them, as often as it is called."""
    numpy = sys.modules.get("numpy")  # while nothing has imported it, it has no state
    of_python, of_torch, of_numpy = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        random.setstate(of_python)
        torch.set_rng_state(of_torch)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)

    return restore
