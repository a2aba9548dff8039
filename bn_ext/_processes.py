"""The group of processes that train one model."""

from __future__ import annotations

import torch.distributed as dist


def in_group() -> bool:
    """Whether this process is in a group of :mod:`torch.distributed`."""
    return dist.is_available() and dist.is_initialized()
