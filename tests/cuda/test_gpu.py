"""Only a GPU can show this: every plan at work, streams, graphs, other devices, memory, sizes past 2^31."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import (
    MODES,
    NO_GPU,
    Arguments,
    Case,
    Result,
    channels_last,
    contiguous,
    run_ours,
    run_reference,
    run_torch,
)
from compare import check, ulps_off
from modules import assert_same_state
from torch import Tensor, nn
from ways import WAYS, plan_of

import bn_ext

if NO_GPU:
    pytest.skip(NO_GPU, allow_module_level=True)

pytestmark = pytest.mark.gpu
GPU = "cuda"
LONG_ENOUGH = 50_000_000  # cycles, some 30 ms: whatever does not wait comes too early
every_way = pytest.mark.parametrize("case", WAYS, ids=str)


def assert_same_bits(one: Result, other: Result, context: str) -> None:
    for part in Result._fields:
        first, second = getattr(one, part), getattr(other, part)
        assert first is second is None or torch.equal(first, second), f"{context}: {part} differs"


# ---------------------------------------------------------------------------------------------- every plan


@every_way
def test_results(case: Case) -> None:
    slack = 1.0 if case.activation is None else 2.0  # an activation has its own error in the last place
    for mode in (MODES[0], MODES[2]):
        check(replace(case, mode=mode), GPU, backward=True, slack=slack)


@every_way
def test_run_after_run(case: Case) -> None:
    a = case.arguments(GPU)
    first = run_ours(a, backward=True)
    for _ in range(5):
        assert_same_bits(run_ours(a, backward=True), first, "again")


def misaligned(t: Tensor) -> Tensor:
    """The same values in the same order, one element past an aligned address."""
    room = torch.full((t.numel() + 1,), math.nan, dtype=t.dtype, device=t.device)
    return room.as_strided(t.shape, t.stride(), 1).copy_(t)


@every_way
def test_alignment(case: Case) -> None:
    a = case.arguments(GPU)
    aligned = run_ours(a, backward=True)
    a.input, a.dy = misaligned(a.input), misaligned(a.dy)
    a.residual = None if a.residual is None else misaligned(a.residual)
    assert a.input.data_ptr() % 16
    assert_same_bits(run_ours(a, backward=True), aligned, "misaligned")


@every_way
def test_several_infinities(case: Case) -> None:
    """NaN and Inf are where torch has them on the CPU, whichever values a thread reads first."""
    a = replace(case, mode=MODES[0]).arguments(GPU)
    a.input[:, 0] = math.inf
    a.input[: len(a.input) // 2 + 1, 1] = -math.inf
    for part, ours, torchs in zip(Result._fields, run_ours(a, True), run_torch(a.to("cpu"), True), strict=True):
        if ours is not None:
            kinds = [(t.isnan(), t.isposinf(), t.isneginf()) for t in (ours.cpu(), torchs)]
            assert all(map(torch.equal, *kinds)), f"{part} has other NaN or Inf than torch's"


# ---------------------------------------------------------------------------------------------- streams and graphs


@every_way
def test_side_stream(case: Case) -> None:
    """The input is written late, on the stream where the call is made, for which nothing else waits."""
    a = case.arguments(GPU)
    expected = run_ours(a, backward=True)
    tensors = {name: getattr(a, name) for name in ("input", "dy", "residual") if getattr(a, name) is not None}
    late = replace(a, **{name: torch.zeros_like(t) for name, t in tensors.items()})
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_ENOUGH)
        for name, t in tensors.items():
            getattr(late, name).copy_(t)
        got = run_ours(late, backward=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(got, expected, "on a side stream")


def test_two_streams_at_once() -> None:
    """Calls that meet on the GPU share nothing."""
    cases = [p.arguments(GPU) for p in WAYS if math.prod(p.shape) < 1 << 22]
    expected = [run_ours(a, backward=True) for a in cases]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    got = []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append([run_ours(a, backward=True) for a in cases])
    torch.cuda.synchronize()
    for results in got:
        for one, other in zip(results, expected, strict=True):
            assert_same_bits(one, other, "beside another stream")


def module_for(case: Case, momentum: float | None = 0.1) -> nn.Module:
    rank = max(len(case.shape) - 2, 1)
    kind = getattr(bn_ext, f"BatchNormAct{rank}d" if case.activation else f"BatchNorm{rank}d")
    options = {"activation": case.activation} if case.activation else {}
    return kind(case.shape[1], momentum=momentum, device=GPU, **options).train(case.mode.training)


def inputs_of(a: Arguments) -> list[Tensor]:
    """The input and, if there is one, the residual."""
    return [t.requires_grad_() for t in (a.input, a.residual) if t is not None]


def step(module: nn.Module, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = module(*inputs)
    return [y.detach(), *torch.autograd.grad(y, (*inputs, *module.parameters()), dy)]


@every_way
@pytest.mark.parametrize("momentum", [0.1, None])
def test_graph_of_a_training_step(case: Case, momentum: float | None) -> None:
    """Each replay is a step: results and running statistics as of the same steps without a graph."""
    a = case.arguments(GPU)
    inputs, dy = inputs_of(a), a.dy
    module, twin = module_for(case, momentum), module_for(case, momentum)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up once is not for the graph
        step(module, inputs, dy)
    torch.cuda.current_stream().wait_stream(stream)
    module.load_state_dict(twin.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(module, inputs, dy)
    assert module.num_batches_tracked.item() == 0, "capturing ran the step"
    for count in range(1, 4):
        with torch.no_grad():
            a.input.mul_(count).add_(1)
        graph.replay()
        assert all(map(torch.equal, results, step(twin, inputs, dy)))
        assert_same_state(module, twin)
        assert module.num_batches_tracked.item() == (count if module.training else 0)


# Runs in a process of its own, whose first call of bn_ext is captured: the limits of the GPU are asked for, the kernels
# loaded and their attributes set within the capture.
FIRST_CALL = """\
import sys
import torch
import test_gpu
a = test_gpu.WAYS[int(sys.argv[1])].arguments(test_gpu.GPU)
module, inputs = test_gpu.module_for(test_gpu.WAYS[int(sys.argv[1])]), test_gpu.inputs_of(a)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    results = test_gpu.step(module, inputs, a.dy)
graph.replay()
assert all(map(torch.equal, results, test_gpu.step(module, inputs, a.dy)))
"""
ONE_OF_EACH_TEAM = {plan_of(p, "forward").team: number for number, p in reversed(list(enumerate(WAYS)))}


@pytest.mark.parametrize("way", ONE_OF_EACH_TEAM.values(), ids=ONE_OF_EACH_TEAM)
def test_first_call_in_a_capture(way: int) -> None:
    here, tests = Path(__file__).parents[:2]
    path = [str(here), str(tests / "support"), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", FIRST_CALL, str(way)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_host_does_not_wait(momentum: float | None, training: bool) -> None:
    for case in WAYS:
        a = case.arguments(GPU)
        module, inputs = module_for(case, momentum).train(training), inputs_of(a)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(module, inputs, a.dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_launches_before_the_gpu_is_ready() -> None:
    """The host is through with many steps while the GPU has not begun."""
    a = WAYS[0].arguments(GPU)
    module, inputs = module_for(WAYS[0], None), inputs_of(a)
    step(module, inputs, a.dy)
    torch.cuda.synchronize()
    begun = torch.cuda.Event()
    torch.cuda._sleep(100 * LONG_ENOUGH)  # some seconds: other tests may keep the host busy
    begun.record()
    for _ in range(20):
        step(module, inputs, a.dy)
    assert not begun.query(), "the host waited for the GPU"


# ---------------------------------------------------------------------------------------------- devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_second_device() -> None:
    assert torch.cuda.current_device() == 0
    for case in WAYS:
        check(case, "cuda:1", backward=True)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("elsewhere", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_parameter_on_another_device(elsewhere: str, training: bool) -> None:
    a = Case((4, 6, 5, 2), mode=MODES[0 if training else 2]).arguments(GPU)
    b = replace(a, **{elsewhere: getattr(a, elsewhere).cpu()})
    before = b.running_mean.clone(), b.running_var.clone()
    with pytest.raises(RuntimeError, match=f"is on cpu but input is on {GPU}"):
        bn_ext.functional.batch_norm(b.input, b.running_mean, b.running_var, b.weight, b.bias, training)
    assert b.running_mean.equal(before[0]) and b.running_var.equal(before[1]), "a rejected call changed statistics"


def test_module_on_another_device() -> None:
    module = bn_ext.BatchNorm2d(6)
    with pytest.raises(RuntimeError, match=f"is on cpu but input is on {GPU}"):
        module(torch.randn(4, 6, 5, 2, device=GPU))
    assert module.num_batches_tracked.item() == 0


# ---------------------------------------------------------------------------------------------- memory

SLACK = 4 << 20  # the allocator's rounding, and all that is C-sized


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_inputs_size_but_the_output(layout, training: bool) -> None:
    x = layout(torch.randn(64, 256, 32, 32, device=GPU)).requires_grad_()
    dy, size = torch.randn_like(x), x.nbytes
    module = bn_ext.BatchNorm2d(256, device=GPU).train(training)
    step(module, [x], dy)

    def peak(call) -> tuple[object, int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return result, torch.cuda.max_memory_allocated() - before

    y, forward = peak(lambda: module(x))
    assert forward < size + SLACK, f"forward took {forward} bytes for an output of {size}"
    _, backward = peak(lambda: torch.autograd.grad(y, (x, *module.parameters()), dy))
    assert backward < size + SLACK, f"backward took {backward} bytes for a gradient of {size}"


ROOM = 30 << 30
PAST_2_TO_THE_31 = (3, 1024, 701, 1000)
assert math.prod(PAST_2_TO_THE_31) > 2**31


@pytest.mark.parametrize(
    ("layout", "half"),
    [(contiguous, torch.float16), (channels_last, torch.bfloat16)],
    ids=["contiguous", "channels_last"],
)
def test_more_than_2_to_the_31_elements(layout, half: torch.dtype) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of free GPU memory")
    sizes = PAST_2_TO_THE_31

    def tensor() -> Tensor:
        if layout is contiguous:
            return torch.randn(sizes, dtype=half, device=GPU)
        return torch.randn(sizes[0], *sizes[2:], sizes[1], dtype=half, device=GPU).movedim(-1, 1)

    per_channel = [torch.rand(1024, device=GPU) + 0.5 for _ in range(4)]
    a = Arguments(tensor().add_(1), *per_channel, training=True, momentum=0.1, eps=1e-5, dy=tensor())
    ours = run_ours(a, backward=True)
    for c in (0, 1, 510, 1022, 1023):  # a channel's results depend on that channel alone
        here = slice(c, c + 1)

        def part(t: Tensor, here: slice = here) -> Tensor:
            return t[:, here] if t.dim() > 1 else t[here]

        expected = run_reference(replace(a, **{k: part(t) for k, t in vars(a).items() if isinstance(t, Tensor)}), True)
        for name, got, exact, scale in zip(Result._fields, ours, *expected, strict=True):
            if got is None:  # there is no residual
                continue
            allowed = 1 if got.dtype == half else 8
            off = ulps_off(part(got), exact, scale)
            assert off <= allowed, f"channel {c}: {name} is {off:.3g} ulps off"
