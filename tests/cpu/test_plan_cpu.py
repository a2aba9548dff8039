"""CPU plans, as tables: every batch-norm layer of some networks, and what holds for any case."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from layers import EFFICIENTNET_B0, MOBILENET_V2, RESNET_50, U_NET

from bn_ext import _C
from bn_ext._C import CpuPlan, Pass

MIB = 1 << 20
NETWORKS = {
    "ResNet-50": (32, RESNET_50),
    "MobileNetV2": (32, MOBILENET_V2),
    "EfficientNet-B0": (32, EFFICIENTNET_B0),
    "U-Net": (8, U_NET),
}
LAYOUTS = "planar", "interleaved"
DIRECTIONS = "forward", "inference", "backward"
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

# csrc/cpu/kernels/kernels.h and plan.cpp.
MOST_CHANNELS = {"planar": 64, "interleaved": 2048}
SERIAL = 32768
TASKS_PER_THREAD = 4


def plan(n: int, c: int, s: int, threads: int = 8, last_cache: int = 32 * MIB, **call: Any) -> CpuPlan:
    return _C.cpu_plan(Pass((n, c, s), **call), threads=threads, last_cache_bytes=last_cache)


# Few channels, single values, odd rows, one row, long rows, everything at once.
AWKWARD = list(itertools.product([1, 2, 33, 4097], [1, 2, 3, 35, 65, 1000], [1, 3, 49, 1023, 65537]))
CASES = [
    *((n, c, side * side) for n, layers in NETWORKS.values() for side, channels in layers.items() for c in channels),
    *AWKWARD,
]


def cut(p: CpuPlan) -> tuple[int | bool, ...]:
    """The fields that the bits of a result depend on."""
    return p.n, p.c, p.s, p.rows, p.segment, p.segments, p.count, p.per_chunk, p.chunks, p.joined


every = pytest.mark.parametrize(("layout", "direction"), [*itertools.product(LAYOUTS, DIRECTIONS)])


@every
def test_every_value_is_in_one_patch(layout: str, direction: str) -> None:
    for sizes in CASES:
        p = plan(*sizes, layout=layout, direction=direction)
        assert p.n * p.c * p.s == sizes[0] * sizes[1] * sizes[2], p
        assert p.segment * (p.segments - 1) < p.s <= p.segment * p.segments, p
        assert p.count == -(-p.n // p.rows) * p.segments, p
        assert p.per_chunk * (p.chunks - 1) < p.count <= p.per_chunk * p.chunks, p
        if layout == "planar" and not p.joined:
            assert p.segment % 16 == 0 or p.segment == p.s, "vectors begin at their multiples"


@every
def test_results_do_not_depend_on_threads_or_cache(layout: str, direction: str) -> None:
    for sizes in CASES:
        plans = [
            plan(*sizes, threads, last_cache, layout=layout, direction=direction)
            for threads, last_cache in itertools.product([1, 2, 3, 64], [MIB, 256 * MIB])
        ]
        assert len({cut(p) for p in plans}) == 1, plans[0]


@every
def test_chunks_are_few(layout: str, direction: str) -> None:
    """Merging them is serial for each channel."""
    for sizes in CASES:
        if direction != "inference":
            assert plan(*sizes, layout=layout, direction=direction).chunks <= 64


@every
def test_threads_share_tiles_or_have_enough_of_them(layout: str, direction: str) -> None:
    for sizes, threads in itertools.product(CASES, [1, 2, 8, 64]):
        p = plan(*sizes, threads, layout=layout, direction=direction)
        kernels = "interleaved" if p.s == 1 and p.c > 1 else "planar"
        assert 1 <= p.tile <= min(MOST_CHANNELS[kernels], p.c), p
        assert p.threads == (1 if p.n * p.c * p.s < SERIAL else threads), p
        if kernels == "interleaved" or direction == "inference":
            assert p.split, p
        elif p.threads > 1:
            assert p.split == (-(-p.c // p.tile) < TASKS_PER_THREAD * p.threads), p
        else:
            assert not p.split, p


@every
@pytest.mark.parametrize("dtype", SIZES)
def test_outputs_past_the_cache_are_large_and_have_whole_rows(dtype: str, layout: str, direction: str) -> None:
    for sizes, last_cache in itertools.product(CASES, [MIB, 32 * MIB]):
        p = plan(*sizes, last_cache=last_cache, dtype=dtype, layout=layout, direction=direction)
        output = p.n * p.c * p.s * SIZES[dtype]
        row = p.tile * p.s if p.joined else p.s if p.s > 1 or p.c == 1 else p.c
        whole = row * SIZES[dtype] % min(64, 16 * SIZES[dtype]) == 0
        assert p.bypass_cache == (output >= last_cache / 8 * 5 and whole), p


@every
def test_whole_bytes_of_a_mask(layout: str, direction: str) -> None:
    """No run of vectors ends within a byte, and the mask ends with a word."""
    for sizes in CASES:
        p = plan(*sizes, layout=layout, direction=direction)
        planar = p.s > 1 or p.c == 1
        row = p.s if planar and not p.joined else p.c * p.s
        run = p.tile * p.s if p.joined else p.segment if planar else p.tile
        assert p.whole_bytes == (p.n * p.c * p.s % 32 == 0 and row % 8 == 0 and run % 8 == 0), p


@every
def test_what_is_fetched_ahead(layout: str, direction: str) -> None:
    for sizes, dtype in itertools.product(CASES, SIZES):
        p = plan(*sizes, dtype=dtype, layout=layout, direction=direction)
        interleaved = p.s == 1 and p.c > 1
        page = 4096 // SIZES[dtype] if interleaved and SIZES[dtype] > 2 else 0
        assert p.ahead == (p.tile * p.s if not p.split else p.c * p.s if p.joined else page), p


def test_backward_is_cut_as_forward() -> None:
    for sizes, layout in itertools.product(CASES, LAYOUTS):
        assert plan(*sizes, layout=layout, direction="backward") == plan(*sizes, layout=layout)


# The plans in float32 with eight threads and a last cache of 32 MiB, training and inference: rows x segment of a patch,
# chunks x patches of one, channels of a tile, elements ahead, and which of these hold: joined, split, bypass_cache,
# whole_bytes.
# fmt: off
GOLDEN = """
size     planar forward            planar inference          interleaved forward       interleaved inference
ResNet-50, batch 32
64x112   1x976 26x16 1 12544 --bw  1x12544 32x1 1 0 -sbw     256x1 63x25 64 1024 -sbw  256x1 784x2 64 1024 -sbw
64x56    1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      256x1 56x7 64 1024 -sbw   256x1 196x2 64 1024 -sbw
128x56   1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      128x1 61x13 128 1024 -sbw 128x1 392x2 128 1024 -sbw
256x56   1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      128x1 61x13 256 1024 -sbw 128x1 784x1 256 1024 -sbw
128x28   1x784 2x16 2 1568 ---w    1x784 32x1 20 0 -s-w      128x1 49x4 128 1024 -s-w  128x1 98x2 128 1024 -s-w
256x28   1x784 2x16 2 1568 --bw    1x784 32x1 20 0 -sbw      128x1 49x4 256 1024 -sbw  128x1 196x1 256 1024 -sbw
512x28   1x784 2x16 2 1568 --bw    1x784 32x1 20 0 -sbw      128x1 49x4 512 1024 -sbw  128x1 196x1 512 1024 -sbw
256x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 50176 js-w   128x1 49x1 256 1024 -s-w  128x1 49x1 256 1024 -s-w
512x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 100352 js-w  128x1 49x1 512 1024 -s-w  128x1 49x1 512 1024 -s-w
1024x14  8x196 1x16 8 1568 j-bw    16x196 2x1 8 200704 jsbw  128x1 49x1 1024 1024 -sbw 128x1 49x1 1024 1024 -sbw
512x7    16x49 1x16 16 784 j--w    16x49 2x1 32 25088 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
2048x7   16x49 1x16 32 1568 j--w   16x49 2x1 32 100352 js-w  128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
MobileNetV2, batch 32
16x112   1x976 26x16 1 0 -sbw      1x12544 32x1 1 0 -sbw     1024x1 56x7 16 1024 -sbw  1024x1 196x2 16 1024 -sbw
32x112   1x976 26x16 1 12544 --bw  1x12544 32x1 1 0 -sbw     512x1 61x13 32 1024 -sbw  512x1 392x2 32 1024 -sbw
96x112   1x976 26x16 1 12544 --bw  1x12544 32x1 1 0 -sbw     256x1 63x25 96 1024 -sbw  256x1 1568x1 96 1024 -sbw
24x56    1x784 8x16 1 0 -s-w       1x3136 32x1 5 0 -s-w      768x1 44x3 24 1024 -s-w   768x1 131x1 24 1024 -s-w
96x56    1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      256x1 56x7 96 1024 -sbw   256x1 392x1 96 1024 -sbw
144x56   1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      128x1 61x13 144 1024 -sbw 128x1 784x1 144 1024 -sbw
32x28    1x784 2x16 1 784 ---w     1x784 32x1 20 0 -s-w      512x1 25x2 32 1024 -s-w   512x1 25x2 32 1024 -s-w
144x28   1x784 2x16 2 1568 ---w    1x784 32x1 20 0 -s-w      128x1 49x4 144 1024 -s-w  128x1 196x1 144 1024 -s-w
192x28   1x784 2x16 2 1568 ---w    1x784 32x1 20 0 -s-w      128x1 49x4 192 1024 -s-w  128x1 196x1 192 1024 -s-w
64x14    8x196 1x16 2 392 j--w     16x196 2x1 8 12544 js-w   256x1 13x2 64 1024 -s-w   256x1 13x2 64 1024 -s-w
96x14    8x196 1x16 3 588 j---     16x196 2x1 8 18816 js-w   256x1 25x1 64 1024 -s-w   256x1 25x1 64 1024 -s-w
192x14   8x196 1x16 4 784 j--w     16x196 2x1 8 37632 js-w   128x1 49x1 192 1024 -s-w  128x1 49x1 192 1024 -s-w
384x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 75264 js-w   128x1 49x1 384 1024 -s-w  128x1 49x1 384 1024 -s-w
576x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 112896 js-w  128x1 49x1 576 1024 -s-w  128x1 49x1 576 1024 -s-w
160x7    16x49 1x16 5 245 j---     16x49 2x1 32 7840 js-w    128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
320x7    16x49 1x16 10 490 j---    16x49 2x1 32 15680 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
576x7    16x49 1x16 16 784 j--w    16x49 2x1 32 28224 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
960x7    16x49 1x16 16 784 j--w    16x49 2x1 32 47040 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
1280x7   16x49 1x16 32 1568 j--w   16x49 2x1 32 62720 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
EfficientNet-B0, batch 32
16x112   1x976 26x16 1 0 -sbw      1x12544 32x1 1 0 -sbw     1024x1 56x7 16 1024 -sbw  1024x1 196x2 16 1024 -sbw
32x112   1x976 26x16 1 12544 --bw  1x12544 32x1 1 0 -sbw     512x1 61x13 32 1024 -sbw  512x1 392x2 32 1024 -sbw
96x112   1x976 26x16 1 12544 --bw  1x12544 32x1 1 0 -sbw     256x1 63x25 96 1024 -sbw  256x1 1568x1 96 1024 -sbw
24x56    1x784 8x16 1 0 -s-w       1x3136 32x1 5 0 -s-w      768x1 44x3 24 1024 -s-w   768x1 131x1 24 1024 -s-w
96x56    1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      256x1 56x7 96 1024 -sbw   256x1 392x1 96 1024 -sbw
144x56   1x784 8x16 1 3136 --bw    1x3136 32x1 5 0 -sbw      128x1 61x13 144 1024 -sbw 128x1 784x1 144 1024 -sbw
40x28    1x784 2x16 2 0 -s-w       1x784 32x1 20 0 -s-w      512x1 49x1 40 1024 -s-w   512x1 49x1 40 1024 -s-w
144x28   1x784 2x16 2 1568 ---w    1x784 32x1 20 0 -s-w      128x1 49x4 144 1024 -s-w  128x1 196x1 144 1024 -s-w
240x28   1x784 2x16 2 1568 --bw    1x784 32x1 20 0 -sbw      128x1 49x4 240 1024 -sbw  128x1 196x1 240 1024 -sbw
80x14    8x196 1x16 3 15680 js--   16x196 2x1 8 15680 js-w   256x1 25x1 64 1024 -s-w   256x1 25x1 64 1024 -s-w
112x14   8x196 1x16 4 21952 js-w   16x196 2x1 8 21952 js-w   256x1 25x1 64 1024 -s-w   256x1 25x1 64 1024 -s-w
240x14   8x196 1x16 8 47040 js-w   16x196 2x1 8 47040 js-w   128x1 49x1 240 1024 -s-w  128x1 49x1 240 1024 -s-w
480x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 94080 js-w   128x1 49x1 480 1024 -s-w  128x1 49x1 480 1024 -s-w
672x14   8x196 1x16 8 1568 j--w    16x196 2x1 8 131712 js-w  128x1 49x1 672 1024 -s-w  128x1 49x1 672 1024 -s-w
192x7    16x49 1x16 6 294 j---     16x49 2x1 32 9408 js-w    128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
320x7    16x49 1x16 10 490 j---    16x49 2x1 32 15680 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
672x7    16x49 1x16 16 784 j--w    16x49 2x1 32 32928 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
1152x7   16x49 1x16 32 1568 j--w   16x49 2x1 32 56448 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
1280x7   16x49 1x16 32 1568 j--w   16x49 2x1 32 62720 js-w   128x1 13x1 64 1024 -s-w   128x1 13x1 64 1024 -s-w
U-Net, batch 8
64x256   1x1024 32x16 1 65536 --bw 1x16384 32x1 1 0 -sbw     256x1 64x32 64 1024 -sbw  256x1 1024x2 64 1024 -sbw
128x128  1x1024 8x16 1 16384 --bw  1x16384 8x1 1 0 -sbw      128x1 64x16 128 1024 -sbw 128x1 512x2 128 1024 -sbw
256x64   1x1024 2x16 1 4096 --bw   1x4096 8x1 4 0 -sbw       128x1 64x4 256 1024 -sbw  128x1 256x1 256 1024 -sbw
512x32   1x1024 1x16 2 2048 ---w   1x1024 8x1 16 0 -s-w      128x1 64x1 512 1024 -s-w  128x1 64x1 512 1024 -s-w
1024x16  1x256 1x16 8 2048 ---w    1x256 8x1 64 0 -s-w       128x1 16x1 64 1024 -s-w   128x1 16x1 64 1024 -s-w
"""
# fmt: on


def cell(p: CpuPlan) -> str:
    flags = "".join(letter if holds else "-" for letter, holds in zip("jsbw", flags_of(p), strict=True))
    return f"{p.rows}x{p.segment} {p.chunks}x{p.per_chunk} {p.tile} {p.ahead} {flags}"


def flags_of(p: CpuPlan) -> tuple[bool, ...]:
    return p.joined, p.split, p.bypass_cache, p.whole_bytes


def golden() -> list[str]:
    columns = [*itertools.product(LAYOUTS, ("forward", "inference"))]
    lines = ["size     " + "".join(f"{' '.join(column):26}" for column in columns)]
    for name, (n, layers) in NETWORKS.items():
        lines.append(f"{name}, batch {n}")
        for side, channels in layers.items():
            for c in channels:
                plans = [plan(n, c, side * side, layout=layout, direction=direction) for layout, direction in columns]
                lines.append(f"{f'{c}x{side}':9}" + "".join(f"{cell(p):26}" for p in plans))
    return [line.rstrip() for line in lines]


def test_what_becomes_of_the_layers_of_networks() -> None:
    assert golden() == GOLDEN.strip().splitlines()
