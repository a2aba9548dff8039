"""Jobs in several processes that know each other over the loopback address."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import torch
import torch.distributed as dist

_FORKS = multiprocessing.get_context(forked.METHOD)


def in_each_of(
    ranks: int,
    folder: Path,
    job: Callable,
    *arguments: Any,
    seconds: float = 300,
    patience: float = 120,
    lost: Collection[int] = (),
) -> list:
    """Gives what ``job`` returns in each of so many processes, None for those that are to be ``lost``.

    Where one raises, the others are ended at once, as all are after so many ``seconds``. ``patience`` is the timeout of
    the group in seconds.
    """
    results = [folder / f"rank{rank}.pt" for rank in range(ranks)]
    given = ranks, folder, patience, job, arguments
    workers = [_FORKS.Process(target=_worker, args=(rank, *given), daemon=True) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + seconds
    try:
        while True:
            ended = [not worker.is_alive() for worker in workers]
            for rank in range(ranks):
                error = folder / f"rank{rank}.txt"
                if ended[rank] and (error.exists() or not (results[rank].exists() or rank in lost)):
                    said = error.read_text() if error.exists() else f"exit status {workers[rank].exitcode}"
                    raise AssertionError(f"rank {rank} of {ranks}: {said}")
            if all(ended):
                break
            assert time.monotonic() < deadline, f"{job.__name__}: {ranks} processes did not end in {seconds} s"
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return [torch.load(file, weights_only=False) if file.exists() else None for file in results]


def _worker(rank: int, ranks: int, folder: Path, patience: float, job: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=timeout, rank=rank, world_size=ranks)
    try:
        result = job(*arguments)
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    part = folder / f"rank{rank}.part"
    torch.save(result, part)
    part.rename(folder / f"rank{rank}.pt")
    os._exit(0)


@contextmanager
def collectives(expected: int, group: Any = None) -> Iterator[None]:
    """Asserts that so many collectives are made inside, by the group's own count of them."""
    group = group or dist.group.WORLD
    before = group._get_sequence_number_for_group()
    yield
    made = group._get_sequence_number_for_group() - before
    assert made == expected, f"{made} collectives instead of {expected}"
