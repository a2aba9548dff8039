"""Settings of the CUDA kernels. They can be read and set on a machine without a GPU too."""

from __future__ import annotations

import os

from bn_ext._load import _C

__all__ = ["set_sm_margin", "sm_margin"]


def sm_margin() -> int:
    """How many multiprocessors of a GPU a cooperative grid of ours leaves free.

    Returns:
        The number, 0 unless it was set.

    Raises:
        Nothing.

    Example:
        >>> bn_ext.cuda.sm_margin()
        0
    """
    return _C.sm_margin()


def set_sm_margin(multiprocessors: int) -> None:
    """Leaves so many multiprocessors free in cooperative grids, for kernels of others that run meanwhile.

    Some calls are one cooperative grid, whose blocks all have to be on the GPU at the same time. Such a grid waits
    until kernels that run beside it have made room, a collective of NCCL for example. With a margin of the
    blocks that NCCL runs, both run together. Clusters and single blocks need no room all at once, and no margin.

    The environment variable ``BN_EXT_SM_MARGIN``, read when bn_ext is imported, has the same effect. A margin changes
    the order in which a grid adds up, and so the last bits of results: set it once, and the same in all processes.

    Args:
        multiprocessors: 0 or more, on every GPU. One multiprocessor is left in any case.

    Raises:
        TypeError: it is no int.
        ValueError: it is negative.

    Example:
        >>> bn_ext.cuda.set_sm_margin(16)
        >>> bn_ext.cuda.sm_margin()
        16
        >>> bn_ext.cuda.set_sm_margin(0)
    """
    if not isinstance(multiprocessors, int) or isinstance(multiprocessors, bool):
        raise TypeError(f"multiprocessors should be an int, got {type(multiprocessors).__name__}")
    if not 0 <= multiprocessors < 2**31:
        raise ValueError(f"multiprocessors should be 0 or more, got {multiprocessors}")
    _C.set_sm_margin(multiprocessors)


def _read_environment() -> None:
    asked = os.environ.get("BN_EXT_SM_MARGIN", "0")
    if not asked.isdecimal():
        raise ImportError(f"bn_ext: BN_EXT_SM_MARGIN should be a number of multiprocessors, got {asked}")
    set_sm_margin(int(asked))


_read_environment()
