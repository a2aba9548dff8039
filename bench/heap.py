"""Malloc keeps freed memory or gives it back. It reads its settings from the environment, when a process starts.

By default large tensors go back to the system, and fresh ones come as pages that fault one by one: that is how users
run. With the heap kept, the kernels are compared and not the page faults.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

VARIABLES = {"kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}, "default": {}}
NAMES = {"kept": "the heap kept", "default": "the default allocator"}
GUARD = "BN_EXT_BENCH_HEAP"


def add_option(parser: argparse.ArgumentParser) -> None:
    text = "kept: freed memory stays in the process; default: as users run (default: %(default)s)"
    parser.add_argument("--heap", choices=VARIABLES, default="kept", help=text)


def chosen(arguments: Sequence[str]) -> str:
    """The heap that a command line asks for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--heap", default="kept")
    heap = parser.parse_known_args(arguments)[0].heap
    return heap if heap in VARIABLES else "kept"  # the real parser says what is wrong


def restart(heap: str) -> None:
    """Restarts this process with the variables of ``heap`` and no others of malloc's, unless it was started so."""
    if os.environ.get(GUARD) != heap:
        others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**others, **VARIABLES[heap], GUARD: heap})
