"""The model of time: its steps and waves by hand, and that more work never takes less time. It is no measurement."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from bench import gpu_model
from bench.gpu_model import COPY, NOW, Kernel, Steps, model, plan_of

PAGE = Path(__file__).parents[2] / "docs/gpu_model.md"
ONE_WAVE = "32x64x14x14", "contiguous", "float32", "bn"
MANY_WAVES = "256x2048x7x7", "contiguous", "float32", "bn"
GRID = "256x512x28x28", "channels_last", "bfloat16", "bn"
NOTHING = Kernel(start=0, settle=0, reduce=0, cluster=0, grid=0, exchange_loads=10**6, finish=0, end=0)


def test_the_first_wave_by_hand() -> None:
    kernel = Kernel(start=1, settle=2, reduce=4, cluster=8, finish=16, end=32)
    plan = plan_of(MANY_WAVES, "forward", "h100")
    assert plan.team == "cluster" and plan.team_blocks == 2 and plan.slabs > 132
    (first, *_), time, rate = model(MANY_WAVES, "forward", kernel)
    tensor = 256 * 2048 * 49 * 4
    moved = 132 / plan.slabs * tensor / COPY
    assert first == pytest.approx(Steps(1.7, moved, 6, 8, 16, moved, 32))
    assert rate == pytest.approx(2 * tensor / COPY / time)


def test_an_exchange_is_a_chain_of_loads_or_bytes() -> None:
    plan = plan_of(GRID, "forward", "h100")
    assert (plan.team_blocks, plan.channels) == (264, 32)
    one, many = (gpu_model.exchange(plan, Kernel(grid=1, exchange_loads=loads)) for loads in (1, 8))
    assert one == pytest.approx(1 + 264 / 4 * 0.17)
    assert many == pytest.approx(1 + 264**2 * 64 * 8 / 5.5e6)


def test_clusters_fit_into_gpcs() -> None:
    case = "256x2048x7x7", "channels_last", "float32", "bn"
    plan = plan_of(case, "forward", "h100")
    assert (plan.team_blocks, plan.threads, gpu_model.teams_at_once(plan), plan.slabs) == (8, 256, 31, 128)
    waves, _, _ = model(case, "forward")
    assert len(waves) == 5
    assert waves[-1].load > 4 / 128 * 256 * 2048 * 49 * 4 / COPY, "four clusters alone do not reach a copy's rate"


def test_without_its_gaps_a_kernel_moves_at_a_copys_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "FIRST", 0)
    for batch, (dtype, direction) in product((32, 256), gpu_model.COLUMNS):
        for shape, layout in gpu_model.cases(batch):
            assert model((shape, layout, dtype, "bn"), direction, NOTHING).of_copy <= 1 + 1e-9
    assert model(MANY_WAVES, "forward", NOTHING).of_copy > 0.99


def test_no_gap_makes_it_faster() -> None:
    for field in ("start", "settle", "reduce", "cluster", "grid", "finish", "end"):
        longer = replace(NOW, **{field: getattr(NOW, field) + 1})
        for case, direction in product((ONE_WAVE, MANY_WAVES, GRID), ("forward", "backward", "inference")):
            assert model(case, direction, longer).microseconds >= model(case, direction).microseconds
    fewer = replace(NOW, exchange_loads=1)
    more = replace(NOW, exchange_loads=2)
    assert model(GRID, "forward", more).microseconds < model(GRID, "forward", fewer).microseconds
    apart = replace(NOW, overlap=NOW.overlap + 0.1)
    assert model(MANY_WAVES, "forward", apart).microseconds < model(MANY_WAVES, "forward").microseconds
    assert model(GRID, "forward", apart).microseconds == model(GRID, "forward").microseconds, "one team is in step"


def test_more_images_take_more_time() -> None:
    for layout, dtype, direction in product(gpu_model.LAYOUTS, ("float32", "bfloat16"), ("forward", "inference")):
        times = [
            model((f"{n}x512x28x28", layout, dtype, "bn"), direction).microseconds for n in (8, 32, 128, 512, 2048)
        ]
        assert times == sorted(times)


def test_the_page_has_what_the_model_says() -> None:
    page = PAGE.read_text()
    assert gpu_model.MARKS[0] + gpu_model.tables() + gpu_model.MARKS[1] in page
    assert "No figure on this page was measured on a GPU" in page and "model, no measurement" in gpu_model.tables()


def test_explained() -> None:
    said = gpu_model.explained(GRID, "forward")
    assert said.startswith("resident, grid, 1 x 264 blocks, slabs: 16\nwaves: 16, ")
    assert said.endswith("of a copy's rate. A model, no measurement.")
    assert math.isclose(sum(model(GRID, "forward").waves[0]), sum(model(GRID, "forward").waves[-1]))
