"""A bar on a terminal; elsewhere one line at the end of each task."""

from __future__ import annotations

import sys
import time

WIDTH = 30


class Progress:
    stage = "the start"  # in words, for whoever interrupts

    def begin(self, task: str, total: int) -> None:
        self.task = self.stage = task
        self.total, self.done = total, 0
        self.start = time.monotonic()

    def at(self, stage: str) -> None:
        self.stage = stage

    def advance(self) -> None:
        self.done += 1
        ended = self.done == self.total
        text = f"{self.task}: {self.done}/{self.total}, {time.monotonic() - self.start:.0f} s"
        if sys.stderr.isatty():
            bar = f"{'#' * (WIDTH * self.done // self.total):<{WIDTH}}"
            print(f"\r[{bar}] {text}", end="\n" if ended else "", file=sys.stderr, flush=True)
        elif ended:
            print(text, file=sys.stderr, flush=True)
