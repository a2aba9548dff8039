"""``python -m bench``: the measurement on the CPU."""

import os
import sys

# Fresh outputs of many megabytes otherwise measure the page faults of mmap: keep freed memory in the heap.
STEADY_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
GUARD = "BN_EXT_BENCH_STEADY_HEAP"


def restart_with_steady_heap() -> None:
    """Starts this process over with STEADY_HEAP, which malloc reads only at the start."""
    if GUARD not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **STEADY_HEAP, GUARD: "1"})


if __name__ == "__main__":
    restart_with_steady_heap()
    from bench.cpu import main

    sys.exit(main())
