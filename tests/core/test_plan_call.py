"""``bn_ext.plan``, and plans as values: compared, and printed whole."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import Case, Types, channels_last, contiguous
from ways import plan_of

import bn_ext
from bn_ext import _C
from bn_ext._C import CpuPlan, LaunchPlan

MIB = 1 << 20
SHAPE = (32, 64, 56, 56)


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_plan_prints_every_field(device: str) -> None:
    """The properties of its class, with their values, in the constructor's form."""
    plan = bn_ext.plan(SHAPE, device=device)
    kind = CpuPlan if device == "cpu" else LaunchPlan
    assert type(plan) is kind
    properties = {name for name, value in vars(kind).items() if isinstance(value, property)} - {"per_lane"}
    name, text = re.fullmatch(r"(\w+)\((.*)\)", repr(plan)).groups()
    assert name == kind.__name__
    fields = dict(field.split("=") for field in text.split(", "))
    assert fields == {name: repr(getattr(plan, name)) for name in properties}


def test_the_text_of_plans() -> None:
    assert repr(bn_ext.plan(SHAPE, threads=8, last_cache_bytes=32 * MIB)) == (
        "CpuPlan(n=32, c=64, s=3136, rows=1, segment=784, segments=4, count=128, per_chunk=16, chunks=8, joined=False, "
        "sets=1, last_n=32, last_joined=False, tile=1, threads=8, split=False, bypass_cache=True, whole_bytes=True, "
        "ahead=3136)"
    )
    assert repr(bn_ext.plan(SHAPE, device="h100")) == (
        "LaunchPlan(strategy='resident', team='cluster', sums=True, channels=1, width=784, threads=256, active=256, "
        "sets=1, slabs=64, teams=64, team_blocks=4, share=6272, held=25, tensors_held=1, mask_parts=0, "
        "zeroed_branches=False, shared_bytes=104560, workspace_bytes=0, bytes_moved=51380224, bytes_on_chip=25690112)"
    )


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_equal_calls_have_equal_plans(device: str) -> None:
    plan = bn_ext.plan(SHAPE, device=device)
    assert plan == bn_ext.plan(SHAPE, torch.float32, torch.contiguous_format, "forward", device=device)
    assert plan != bn_ext.plan(SHAPE, torch.float32, torch.channels_last, device=device)
    assert plan != bn_ext.plan(SHAPE, direction="inference", device=device)
    assert plan != bn_ext.plan(SHAPE[:-1], device=device)
    # Nothing is between the values of these.
    assert bn_ext.plan((6, 3, 4, 5), device=device) == bn_ext.plan((6, 3, 20), device=device)
    assert bn_ext.plan((6, 3), device=device) == bn_ext.plan((6, 3, 1, 1), device=device)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("direction", ["forward", "inference", "backward"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_the_plan_of_a_layer(layout: Any, direction: str, activation: str | None, residual: bool) -> None:
    """The plan of the same case in the terms of kernels."""
    memory_format = {contiguous: torch.contiguous_format, channels_last: torch.channels_last}[layout]
    how = {"direction": direction, "activation": activation, "residual": residual, "device": "h100"}
    for dtype in (torch.float32, torch.float16):
        types = Types(dtype, torch.float32, torch.float32)
        case = Case(SHAPE, layout, types, residual=residual, activation=activation)
        assert bn_ext.plan(SHAPE, dtype, memory_format, **how) == plan_of(case, direction)


def test_channels_last_in_3d_is_interleaved() -> None:
    flat = bn_ext.plan((2 * 5 * 6 * 7, 12))
    assert bn_ext.plan((2, 12, 5, 6, 7), memory_format=torch.channels_last_3d) == flat
    assert bn_ext.plan((2, 12, 30, 7), memory_format=torch.channels_last) == flat


def test_threads_and_cache_are_the_machines_unless_given() -> None:
    assert bn_ext.plan(SHAPE) == bn_ext.plan(
        SHAPE, threads=torch.get_num_threads(), last_cache_bytes=_C.last_cache_bytes()
    )
    assert bn_ext.plan(SHAPE, threads=7).threads == 7
    assert bn_ext.plan(SHAPE, last_cache_bytes=MIB).bypass_cache
    assert not bn_ext.plan(SHAPE, last_cache_bytes=64 * MIB).bypass_cache


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"shape": (3,)}, ValueError, "shape should be"),
        ({"shape": (2, 0, 4, 4)}, ValueError, "positive"),
        ({"shape": (2**40, 3, 2**40)}, ValueError, "as many values"),
        ({"shape": (2**64, 3)}, TypeError, "incompatible"),
        ({"dtype": "float32"}, TypeError, "dtype should be a torch.dtype, got str"),
        ({"dtype": torch.int64}, ValueError, "dtype should be one of bfloat16, float16, float32, float64, got int64"),
        ({"memory_format": "channels_last"}, TypeError, "memory_format should be"),
        ({"memory_format": torch.channels_last_3d}, ValueError, "does not fit a shape of 4 dimensions"),
        ({"memory_format": torch.preserve_format}, ValueError, "does not fit"),
        ({"direction": "training"}, ValueError, "direction should be one of backward, forward, inference"),
        ({"activation": "voodoo"}, ValueError, "activation should be one of"),
        ({"device": "voodoo"}, ValueError, "voodoo, there are t4, a100"),
        ({"device": "h100", "threads": 2}, ValueError, "are for device='cpu', got device='h100'"),
        ({"device": "h100", "last_cache_bytes": MIB}, ValueError, "are for device='cpu'"),
        ({"threads": 0}, ValueError, "should be positive"),
        ({"last_cache_bytes": -1}, ValueError, "should be positive"),
    ],
)
def test_what_is_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn_ext.plan(**{"shape": SHAPE, **wrong})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_a_set_of_all_images_has_the_plan_of_none(device: str, direction: Any, layout: torch.memory_format) -> None:
    plain = bn_ext.plan(SHAPE, torch.float32, layout, direction, device=device)
    for set_size in (SHAPE[0], 1000):
        assert bn_ext.plan(SHAPE, torch.float32, layout, direction, set_size=set_size, device=device) == plain


def test_plans_of_sets() -> None:
    """A set is cut as a case of its own; its slabs, on a GPU, are some of one launch."""
    for set_size, sets, last in ((8, 8, 4), (1, 60, 1), (30, 2, 30)):
        of_sets, alone = (
            bn_ext.plan((n, 64, 56, 56), set_size=size, threads=2, last_cache_bytes=32 * MIB)
            for n, size in ((60, set_size), (set_size, None))
        )
        assert (of_sets.sets, of_sets.n, of_sets.last_n) == (sets, set_size, last)
        for name in ("rows", "segment", "segments", "count", "per_chunk", "chunks", "joined"):
            assert getattr(of_sets, name) == getattr(alone, name), name
        launch, plain = (bn_ext.plan((60, 64, 56, 56), set_size=s, device="h100") for s in (set_size, None))
        assert (launch.sets, launch.slabs) == (sets, sets * plain.slabs // (plain.slabs // 64))
        assert launch.bytes_moved == plain.bytes_moved
        assert launch.workspace_bytes == -(-4 * launch.teams // 16) * 16 + 4 * 64  # arrivals of teams, and of sets
    many, few = (
        bn_ext.plan(
            (64, 32, 8, 8), torch.float32, torch.channels_last, set_size=s, threads=2, last_cache_bytes=32 * MIB
        )
        for s in (2, 32)
    )
    assert (many.split, few.split) == (False, True)  # a thread takes whole sets where there are enough


def test_set_sizes_that_are_none() -> None:
    with pytest.raises(ValueError, match="set_size should be positive, got 0"):
        bn_ext.plan(SHAPE, set_size=0)
    with pytest.raises(TypeError, match="set_size should be an int or None, got float"):
        bn_ext.plan(SHAPE, set_size=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", "h100"])
def test_inference_has_no_sets(device: str) -> None:
    plain, of_sets = (bn_ext.plan(SHAPE, direction="inference", device=device, set_size=s) for s in (None, 8))
    assert plain == of_sets


@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_stage_alone_reads_and_writes_its_part(activation: str, residual: bool) -> None:
    """The whole, less what the other stage reads or writes."""
    forward = _C.Pass((8, 4, 100), activation=activation, residual=residual)
    backward = _C.Pass((8, 4, 100), direction="backward", activation=activation, residual=residual)
    for whole in (forward, backward):
        reduce, apply = whole.only("reduce"), whole.only("apply")
        assert (reduce.reduce_reads, reduce.apply_reads) == (whole.reduce_reads, (0, False))
        assert (reduce.writes, reduce.holds) == ((0, False), 0)
        assert (apply.reduce_reads, apply.apply_reads) == ((0, False), whole.apply_reads)
        assert apply.writes == whole.writes
        assert _C.launch_plan(apply).strategy == _C.launch_plan(reduce).strategy == "elementwise"
        assert (_C.launch_plan(reduce).sums, _C.launch_plan(apply).sums) == (True, False)
