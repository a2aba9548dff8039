"""The model that runs CUDA kernels on the CPU: small kernels (simt/toys.cpp), each right or wrong in one way. What is
wrong is found and named; what is right gives the same in every order."""

from __future__ import annotations

import functools
import re
from ctypes import c_bool, c_char_p, c_int, c_int64, c_void_p
from typing import NamedTuple

import numpy as np
import pytest
from simt.build import HERE, Launch, Library, library, sanitized

SEEDS = range(50)


class Toy(NamedTuple):
    name: str
    error: str = ""  # of the wrong one, with threads in order
    blocks: int = 1
    cluster: int = 1
    cooperative: bool = False
    n: int = 64  # values, which it puts in reverse
    threads: int = 64
    shared_bytes: int = 256


TOYS = [
    Toy("missing_barrier", "block 0: thread 0: reads element 63 of 4 bytes, .* which nothing wrote"),
    Toy(
        "missing_second_barrier",
        "block 0: thread 32: reads element 31 .* thread 31 of block 0 .* wrote with no barrier",
    ),
    Toy("exchange_as_barrier", "block 0: thread 0: reads element 63 .* thread 63 of block 0 .* wrote with no barrier"),
    Toy("barrier_in_branch", "deadlock: block 0: threads 0-6 at sync_block .*, threads 7-63 returned"),
    Toy("barrier_in_both_branches", "block 0: thread 1: diverges from thread 0, which is at sync_block"),
    Toy("early_return", "deadlock: block 0: threads 0-4 6-63 at sync_block .*, thread 5 returned"),
    Toy("shared_off_by_one", "block 0: thread 63: writes element 64 of 4 bytes, at byte 256 of 256 .* out of bounds"),
    Toy("shared_unwritten", "block 0: thread 60: reads element 3 of 4 bytes, .* which nothing wrote"),
    Toy("misaligned_array", "block 0: thread 0: a shared array at byte 4 of 256"),
    Toy("global_misaligned", "block 0: thread 0: address 0x.*4 is no multiple of 16"),
    Toy("lanes_that_never_come", "deadlock: block 0: .*threads 0-15 32-47 at shuffle_xor of lanes 0-31"),
    Toy("lanes_without_caller", "block 0: thread 16: ballot whose `lanes` do not name the caller"),
    Toy("lanes_that_differ", "block 0: thread 1: diverges from thread 0, which is at shuffle_xor of lanes 0-31"),
    Toy("lane_not_named", "block 0: thread 0: shuffle_xor from lane 4, which `lanes` does not name"),
    Toy("votes", "deadlock: block 0: thread 9 at ballot of lanes 0-31 .*, threads 0-8 10-63 returned"),
    Toy("peer_before_barrier", "block 0: thread 0: reads .* in block 1's .* before a cluster barrier", 2, 2, n=128),
    Toy("peer_after_return", "block 1: thread 0: reads .* in block 0's .* that block has returned", 2, 2, n=128),
    Toy("peer_after_arrival", "block 0: thread 0: reads .* in block 1's .* after arrive_cluster", 2, 2, n=128),
    Toy("peer_not_awaited", "block 0: thread 0: returns between arrive_cluster and wait_cluster", 2, 2, n=128),
    Toy("wait_without_arrival", "block 0: thread 0: wait_cluster without arrive_cluster", 2, 2, n=128),
    Toy("barrier_within_barrier", "block 0: thread 0: sync_cluster between arrive_cluster and", 2, 2, n=128),
    Toy("peer_written_again", "block 0: thread 63: writes .* which thread 0 of block 1 .* read with", 2, 2, n=128),
    Toy("peer_outside_cluster", "block 0: thread 0: block 2 of a cluster of 2", 2, 2, n=128),
    Toy(
        "grid_barrier",
        "deadlock: blocks 0 2: threads 0-63 at sync_grid .*; block 1: threads 0-63 returned",
        3,
        1,
        True,
        n=192,
    ),
    Toy("barrier_of_pairs", "deadlock: blocks 0-3: .*thread 0 at .* with 4 of 5 arrivals", 4, 1, True, n=256),
    Toy("spin", "no thread gets anywhere: block 0: threads 0-63 not waiting"),
]
MEMORY_TOYS = [
    Toy("global_off_by_one", "block 0: thread 0: .*heap-buffer-overflow.*READ of size 4.*located 0 bytes to the right"),
    Toy("unguarded_tail", "block 2: thread 22: .*heap-buffer-overflow.*READ of size 4.*located 0 bytes", 3, n=150),
]


@functools.cache
def toys(*, sanitize: bool = False, portable: bool = False) -> Library:
    defines = ["BN_SIMT_PORTABLE"] if portable else []
    loaded = Library(library("toys", [HERE / "toys.cpp"], sanitize=sanitize, defines=defines))
    name, flag, small, large, address = c_char_p, c_bool, c_int, c_int64, c_void_p
    loaded.run_toy.argtypes = [name, flag, large, small, large, small, flag, address, address, small]
    return loaded


def run(toy: Toy, *, wrong: bool = False, of: Library | None = None, input_at: int | None = None) -> list[int]:
    values = np.arange(toy.n, dtype=np.int32)
    out = np.zeros_like(values)
    input_at = input_at or values.ctypes.data
    shape = toy.blocks, toy.threads, toy.shared_bytes, toy.cluster, toy.cooperative
    (of or toys()).run_toy(toy.name.encode(), wrong, *shape, input_at, out.ctypes.data, toy.n)
    return out.tolist()


def in_reverse(toy: Toy) -> list[int]:
    return list(reversed(range(toy.n)))


def error_of(toy: Toy) -> str:
    with pytest.raises(RuntimeError) as caught:
        run(toy, wrong=True)
    return str(caught.value)


@pytest.mark.parametrize("toy", TOYS, ids=[toy.name for toy in TOYS])
def test_what_is_wrong_is_named(toy: Toy) -> None:
    toys().configure()
    message = error_of(toy)
    assert re.match(f"kernel {toy.name}: {toy.error}", message), message
    assert run(toy) == in_reverse(toy), "the error left something behind"


@pytest.mark.parametrize("toy", TOYS, ids=[toy.name for toy in TOYS])
def test_what_is_wrong_is_found_in_every_order(toy: Toy) -> None:
    for seed in SEEDS[: 2 if toy.name == "spin" else None]:
        toys().configure(seed, preempt=seed % 3)
        message = error_of(toy)
        assert re.match(rf"kernel {toy.name}: .*blocks? \d.*: threads? \d", message), message


@pytest.mark.parametrize("toy", TOYS + MEMORY_TOYS, ids=[toy.name for toy in TOYS + MEMORY_TOYS])
def test_what_is_right_is_right_in_every_order(toy: Toy) -> None:
    for seed in SEEDS:
        toys().configure(seed, preempt=seed % 3)
        assert run(toy) == in_reverse(toy)


@pytest.mark.parametrize("toy", TOYS, ids=[toy.name for toy in TOYS])
def test_portable_switch(toy: Toy) -> None:
    assert run(toy, of=toys(portable=True)) == in_reverse(toy)


def test_sums() -> None:
    """A block's sums are the same in every order; what is added across blocks comes in theirs."""
    toy = Toy("sums", blocks=6, n=6 * 128, threads=128)
    of_blocks = np.arange(toy.n).reshape(toy.blocks, -1).sum(1).tolist()
    seen = set()
    for seed in SEEDS:
        toys().configure(seed)
        before = tuple(run(toy)[: toy.blocks])
        seen.add(before)
        in_order = sorted(before)
        assert sorted(np.diff([0, *in_order]).tolist()) == of_blocks
    assert len(seen) > len(SEEDS) // 2


def test_order_is_the_seeds() -> None:
    toy = Toy("order", blocks=2, n=128)

    def order(seed: int, preempt: int = 0) -> list[int]:
        toys().configure(seed, preempt=preempt)
        return run(toy)

    assert order(0) == list(range(toy.n))
    assert len({tuple(order(seed)) for seed in SEEDS}) == len(SEEDS)
    assert order(7) == order(7)
    assert order(0, preempt=2) not in (order(0), order(0, preempt=3))
    assert sorted(order(0, preempt=2)) == order(0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"threads": 1025}, "1025 threads in a block"),
        ({"threads": 0}, "0 threads in a block"),
        ({"blocks": 0}, "0 blocks in clusters of 1"),
        ({"blocks": 3, "cluster": 2}, "3 blocks in clusters of 2"),
        ({"blocks": 17, "cluster": 17}, "a cluster of 17"),
        ({"shared_bytes": 1025}, "1025 bytes of shared memory, of 1024"),
        ({"blocks": 9, "cooperative": True}, "9 blocks at the same time, of 8"),
    ],
    ids=str,
)
def test_shape_that_cannot_be_launched(change: dict[str, int], error: str) -> None:
    toys().configure(resident_blocks=8, shared_bytes=1024)
    assert error_of(Toy("order")._replace(**change)) == f"kernel order: cannot be launched: {error}"


def test_grid_barrier_needs_a_cooperative_launch() -> None:
    toys().configure()
    message = error_of(Toy("grid_barrier", blocks=3, n=192))
    assert message.startswith("kernel grid_barrier: block 0: thread 0: sync_grid in a launch that is not cooperative")


def test_barrier_of_blocks_that_are_not_there_together() -> None:
    toys().configure()
    message = error_of(Toy("barrier_of_pairs", blocks=2, n=128))
    assert re.match("kernel barrier_of_pairs: deadlock: block 0: .*thread 0 at sync_blocks with 1 of 2", message), (
        message
    )


def test_record_of_launches() -> None:
    toys().configure()
    run(Toy("grid_barrier", "", 3, 1, True, n=192))
    with pytest.raises(RuntimeError):
        run(Toy("order", threads=2000))
    assert toys().launches() == [Launch("grid_barrier", 3, 64, 256, 1, True), Launch("order", 1, 2000, 256, 1, False)]
    toys().configure()
    assert toys().launches() == []


def run_sanitized(toy: Toy, *, wrong: bool = False, freed: bool = False, seed: int = 0) -> list[int]:
    toys(sanitize=True).configure(seed)
    input_at = np.arange(100_000).ctypes.data if freed else None
    return run(toy, wrong=wrong, of=toys(sanitize=True), input_at=input_at)


@pytest.mark.parametrize("toy", MEMORY_TOYS, ids=[toy.name for toy in MEMORY_TOYS])
def test_memory_outside_an_array(toy: Toy) -> None:
    error = sanitized().submit(run_sanitized, toy, wrong=True).exception()
    assert re.match(f"kernel {toy.name}: {toy.error}", str(error), re.DOTALL), error


def test_memory_that_was_freed() -> None:
    error = sanitized().submit(run_sanitized, Toy("unguarded_tail"), freed=True).exception()
    pattern = "kernel unguarded_tail: block 0: thread 0: .*heap-use-after-free.*READ of size 4"
    assert re.match(pattern, str(error), re.DOTALL), error


@pytest.mark.parametrize("toy", TOYS + MEMORY_TOYS, ids=[toy.name for toy in TOYS + MEMORY_TOYS])
def test_sanitized(toy: Toy) -> None:
    for seed in SEEDS[:2]:
        assert sanitized().submit(run_sanitized, toy, seed=seed).result() == in_reverse(toy)
