"""The same input gives the same bits: run after run, for any number of threads, wherever it lies in memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import BFLOAT, DOUBLE, FLOAT, MODES, Case, Result, channels_last, contiguous, run_ours, unaligned

SHAPES = [
    (5, 3),
    (2051, 70),
    (300, 7),
    (3, 65, 49),
    (2, 2, 70001),
    (16, 33, 14, 14),
    (1, 3, 150, 151),
    (2, 5, 9, 31, 33),
]
CASES = [
    Case(shape, layout, types)
    for shape in SHAPES
    for layout in (contiguous, channels_last)
    for types in (FLOAT, DOUBLE, BFLOAT)
]
CASES += [
    Case(shape, layout, FLOAT, residual=True, activation=activation)
    for shape in SHAPES
    for layout in (contiguous, channels_last)
    for activation in ("relu", "silu")
]


def assert_same_bits(one: Result, other: Result, context: str) -> None:
    for part in Result._fields:
        first, second = getattr(one, part), getattr(other, part)
        assert first is second is None or torch.equal(first, second), f"{context}: {part} differs"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_number_of_threads(case: Case) -> None:
    a = case.arguments("cpu")
    torch.set_num_threads(1)
    alone = run_ours(a, backward=True)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run_ours(a, backward=True), alone, f"{threads} threads")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_run_after_run(case: Case, device: str) -> None:
    a = case.arguments(device)
    first = run_ours(a, backward=True)
    for _ in range(3):
        assert_same_bits(run_ours(a, backward=True), first, "again")


@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alignment(shape: tuple[int, ...], types, device: str) -> None:
    a = Case(shape, types=types).arguments(device)
    aligned = run_ours(a, backward=True)
    a.input, a.dy = unaligned(a.input), unaligned(a.dy)
    assert_same_bits(run_ours(a, backward=True), aligned, "unaligned")


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_gradients_change_nothing_in_the_forward(mode, device: str) -> None:
    a = Case((3, 65, 9, 7), mode=mode).arguments(device)
    with_gradients, without = run_ours(a, backward=True), run_ours(a)
    assert torch.equal(with_gradients.output, without.output)


@pytest.mark.parametrize("types", [FLOAT, DOUBLE, BFLOAT], ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 300001), (150001, 7)], ids=str)
def test_number_of_threads_with_many_blocks(shape, types) -> None:
    a = Case(shape, types=types).arguments("cpu")
    torch.set_num_threads(1)
    alone = run_ours(a, backward=True)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_same_bits(run_ours(a, backward=True), alone, f"{threads} threads")


def test_a_thread_with_a_small_stack() -> None:
    """64 kB, as the C libraries of small systems give: kernels keep their arrays elsewhere. In a process of its own."""
    code = """
import threading, torch
from bn_ext.functional import batch_norm

def step():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shape in ((4, 2048, 3, 3), (64, 2048), (8, 64, 64, 64)):
            for format in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
                x = torch.randn(shape, dtype=dtype).to(memory_format=format).requires_grad_()
                for activation in (None, "silu"):
                    y = batch_norm(x, None, None, training=True, residual=x.detach(), activation=activation)
                    y.sum().backward()

torch.set_num_threads(1)
threading.stack_size(64 * 1024)
thread = threading.Thread(target=step)
thread.start()
thread.join()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
