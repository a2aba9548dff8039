"""The tests for GPUs run on the CPU as far as they go: that one of them fails by itself shows here."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import cases
import pytest
import torch
from cases import Case, channels_last, contiguous
from ways import WAYS

SMALL = [case for case in WAYS if math.prod(case.shape) < 1 << 19]
every_small_way = pytest.mark.parametrize("case", SMALL, ids=str)


def on(device: str) -> Iterator[ModuleType]:
    """tests/cuda/test_gpu.py with another device in the place of the GPU, on which every stream is the only one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "NO_GPU", None)
        patch.delitem(sys.modules, "test_gpu", raising=False)
        module = importlib.import_module("test_gpu")
        patch.delitem(sys.modules, "test_gpu")
        patch.setattr(module, "GPU", device)
        for name in ("Stream", "Event", "_sleep", "current_stream", "synchronize", "set_sync_debug_mode"):
            patch.setattr(torch.cuda, name, Stub)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
        yield module


class Stub:
    """A stream, an event, or what is done with them."""

    def __init__(self, *_: object) -> None: ...
    def wait_stream(self, other: Stub) -> None: ...
    def record(self) -> None: ...
    def query(self) -> bool:
        return False


@pytest.fixture(scope="module")
def gpu_tests() -> Iterator[ModuleType]:
    yield from on("cpu")


@pytest.fixture(scope="module")
def meta_tests() -> Iterator[ModuleType]:
    yield from on("meta")


NAMES = ("test_results", "test_run_after_run", "test_alignment", "test_several_infinities", "test_side_stream")


@every_small_way
@pytest.mark.parametrize("name", NAMES)
def test_every_way(name: str, case: Case, gpu_tests: ModuleType) -> None:
    getattr(gpu_tests, name)(case)


def test_streams_and_host(gpu_tests: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "WAYS", SMALL)
    gpu_tests.test_two_streams_at_once()
    for training in (True, False):
        gpu_tests.test_host_does_not_wait(None, training)
    gpu_tests.test_launches_before_the_gpu_is_ready()


@every_small_way
def test_a_step_is_a_call(case: Case, gpu_tests: ModuleType) -> None:
    """The tests with graphs capture the whole case: activation, residual, mode."""
    a = case.arguments("cpu")
    ours = cases.run_ours(a, backward=True)
    module = gpu_tests.module_for(case)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(module, name).copy_(getattr(a, name))
    y, dx, *rest = gpu_tests.step(module, gpu_tests.inputs_of(a), a.dy)
    expected = [ours.output, ours.dx, ours.dresidual, ours.dweight, ours.dbias]
    assert all(map(torch.equal, [y, dx, *rest], [t for t in expected if t is not None]))


def test_first_calls_are_of_every_team(gpu_tests: ModuleType) -> None:
    assert gpu_tests.ONE_OF_EACH_TEAM.keys() == {"block", "cluster", "grid"}
    compile(gpu_tests.FIRST_CALL, "first call", "exec")


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_many_elements(layout: Callable, gpu_tests: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "PAST_2_TO_THE_31", (3, 1024, 7, 5))
    gpu_tests.test_more_than_2_to_the_31_elements(layout, torch.bfloat16)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("elsewhere", ["weight", "bias", "running_mean", "running_var"])
def test_message_of_another_device(
    elsewhere: str, training: bool, meta_tests: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device in the GPU's place; its tensors have no values to move or compare."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: torch.empty_like(t, device="cpu"))
    monkeypatch.setattr(torch.Tensor, "equal", lambda one, other: True)
    meta_tests.test_parameter_on_another_device(elsewhere, training)


def test_message_of_a_module_on_another_device(meta_tests: ModuleType) -> None:
    meta_tests.test_module_on_another_device()


def test_sanitized(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "0")  # to be restored
    sanitize = importlib.import_module("sanitize")
    assert sanitize.grids_first(WAYS)[0].shape == (20000, 24) and len(sanitize.grids_first(WAYS)) == len(WAYS)
    assert sanitize.main(SMALL[:2], "cpu") == 0
    assert sanitize.main([Case((5, 3), offset=math.inf), SMALL[0]], "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert [line.endswith(": ok") for line in lines] == [*[True] * 4, False, False, True, True]
