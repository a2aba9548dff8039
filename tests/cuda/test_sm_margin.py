"""The multiprocessors that grids leave free: the setting, plans, and what is launched where a grid finds no room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import Case
from simt.batch_norm import Kernels
from simt.passes import NO_CLUSTERS, WAYS, assert_same_bits, both_passes

import bn_ext
from bn_ext import _C
from bn_ext._C import Pass

GRID = (32, 256, 56, 56)


@pytest.fixture
def _no_margin() -> Iterator[None]:
    yield
    bn_ext.cuda.set_sm_margin(0)


@pytest.mark.usefixtures("_no_margin")
def test_a_grid_leaves_multiprocessors_free() -> None:
    def blocks(margin: int) -> tuple[str, int]:
        bn_ext.cuda.set_sm_margin(margin)
        assert bn_ext.cuda.sm_margin() == margin
        plan = bn_ext.plan(GRID, memory_format=torch.channels_last, device="h100")
        return plan.team, plan.teams * plan.team_blocks

    assert blocks(0) == ("grid", 264)
    for margin in (1, 16, 66):
        team, number = blocks(margin)
        assert team == "grid" and 1.9 * (132 - margin) < number <= 2 * (132 - margin), margin
    assert blocks(500) == blocks(131), "one multiprocessor is left in any case"


def test_clusters_and_blocks_need_no_margin() -> None:
    for sizes in ((32, 64, 3136), (32, 512, 784)):
        assert _C.launch_plan(Pass(sizes)).team != "grid"
        assert _C.launch_plan(Pass(sizes), margin=16) == _C.launch_plan(Pass(sizes))


@pytest.mark.parametrize(
    ("wrong", "error"), [(-1, ValueError), (2**31, ValueError), ("8", TypeError), (True, TypeError)]
)
def test_what_is_no_margin(wrong: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="multiprocessors should be"):
        bn_ext.cuda.set_sm_margin(wrong)  # type: ignore[arg-type]
    assert bn_ext.cuda.sm_margin() == 0


@pytest.mark.parametrize(("asked", "said"), [("8", "8\n"), ("many", "BN_EXT_SM_MARGIN should be a number")])
def test_the_environment(asked: str, said: str) -> None:
    code = "import bn_ext; print(bn_ext.cuda.sm_margin())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "BN_EXT_SM_MARGIN": asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said in done.stdout + done.stderr


def test_a_grid_without_room_is_launched_smaller() -> None:
    """Half of the multiprocessors, until all blocks have a place; the refused launches leave nothing behind."""
    kernels = Kernels()
    grids = [(shape, layout, device) for shape, layout, device in WAYS if device is NO_CLUSTERS]
    assert len(grids) == 3
    for shape, layout, device in grids:
        torch.manual_seed(0)
        kernels.configure()
        whole = both_passes(kernels, Case(shape, layout), device)
        assert kernels.launches() == 2
        torch.manual_seed(0)
        kernels.configure(resident_blocks=2)
        part = both_passes(kernels, Case(shape, layout), device)
        assert kernels.launches() > 2, "one was refused"
        for of_whole, of_part in zip(whole, part, strict=True):
            torch.testing.assert_close(of_part, of_whole)
        assert part.batches == whole.batches
        torch.manual_seed(0)
        assert_same_bits(part, both_passes(kernels, Case(shape, layout), device))
    kernels.configure(resident_blocks=0)
    with pytest.raises(RuntimeError, match="blocks at the same time, of 0"):
        both_passes(kernels, Case(*grids[0][:2]), grids[0][2])
