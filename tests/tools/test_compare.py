"""``bn_ext.compare`` runs a model in every way, refuses wrong results, leaves the model alone. No speed is asserted."""

from __future__ import annotations

import copy
import gc
import math
import random
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bn_ext
from bn_ext.tools import compare as module
from bn_ext.tools import profiling
from bn_ext.tools.comparison import COMPILED, COMPILED_OURS, CONVERTED, FUSED, TORCH, WITHOUT, Comparison, _in_words
from bn_ext.tools.judge import difference
from bn_ext.tools.trial import Call, Trial, mean_square

X = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)
    )


def compare(model: nn.Module, *args: object, **options: object) -> Comparison:
    return bn_ext.compare(model, *args, seconds=0, **options)


def test_a_training_step() -> None:
    model = network()
    before, state, mode = copy.deepcopy(model.state_dict()), torch.get_rng_state(), model[1].__class__
    found = compare(model, X)
    assert [row.name for row in found.rows] == [TORCH, CONVERTED, FUSED, WITHOUT] and not found.failed
    for row in found.rows[:3]:
        assert row.seconds > 0 and row.kept > 0 and row.peak > row.kept and row.speedup[0] <= row.speedup[2]
        assert 0 < row.error < 1e-5
    assert found.rows[1].remark == "2 of 2 batch norms converted"
    assert found.rows[2].remark == "1 of 2 batch norms fused with what follows"
    assert found.bound >= max(row.speedup[1] for row in found.rows)
    printed = str(found)
    assert "Sequential on 6x3x9x9 float32, training step" in printed
    assert _in_words(found.bound) in printed
    assert "kept for backward" in printed and "<table>" in found._repr_html_()
    assert model[1].__class__ is mode and all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_inference_keeps_nothing_for_a_backward() -> None:
    model = network()
    found = compare(model, X, training=False)
    assert model.training and model[1].training
    assert "inference" in found.title and all(row.kept is None and row.peak > 0 for row in found.rows[:3])
    assert "kept for backward" not in str(found)


def test_a_slower_way_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return super().forward(x)

    monkeypatch.setattr(module, "convert", lambda model: Slow(*model))
    found = compare(nn.Sequential(nn.BatchNorm2d(3)), X)
    assert found.rows[1].speedup[1] < 0.9 and found.rows[1].seconds > 0.02


def test_memory_is_counted() -> None:
    big = torch.randn(4, 8, 64, 64)
    found = compare(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), big, loss=torch.sum)
    kept = {row.name: row.kept for row in found.rows}
    assert kept[TORCH] == pytest.approx(big.nbytes, rel=0.01)  # the output of ReLU; fused, the input alone is kept
    assert kept[FUSED] < 0.01 * big.nbytes
    assert found.rows[0].peak >= 2 * big.nbytes


def test_memory_of_a_step_is_counted_without_the_gradients_of_the_step_before() -> None:
    """A step frees them first: they would be missing in its peak."""
    call = Call((X,), {}, mean_square, None, X.device)
    trial = Trial(nn.Sequential(nn.Conv2d(3, 512, 3), nn.BatchNorm2d(512), nn.AdaptiveAvgPool2d(1)), call)
    first = trial.memory()
    assert all(parameter.grad is not None for parameter in trial.model.parameters())
    assert trial.memory() == first


def test_a_converted_and_fused_model_is_torchs_in_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = []

    class Spied(Trial):
        def memory(self) -> tuple[int | None, int]:
            classes.append([type(m) for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)])
            return super().memory()

    monkeypatch.setattr(module, "Trial", Spied)
    found = compare(bn_ext.fuse(network()), X)
    assert not found.failed
    assert classes == [[nn.BatchNorm2d] * 2, [bn_ext.BatchNorm2d] * 2, [bn_ext.BatchNorm2d] * 2]


class Residual(nn.Module):
    """Calls ours as torch's class cannot be called."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = bn_ext.BatchNorm2d(3), bn_ext.BatchNormAct2d(3, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x, x, activation="relu"), x)


def test_a_model_written_for_ours_runs_on_torchs_operators_in_the_first_row() -> None:
    found = compare(Residual(), X)
    assert not found.failed and found.bound is not None


def test_compiled_too() -> None:
    found = compare(network(), X, compile=True)
    assert [row.name for row in found.rows[3:]] == [COMPILED, COMPILED_OURS, WITHOUT] and not found.failed
    assert "With torch.compile on both sides:" in str(found)


def test_compiled_code_is_compiled_and_draws_the_random_numbers_of_eager_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the setting the dropouts differ, as those of eager code in its place would not."""
    monkeypatch.setattr(module, "_compiler", nullcontext)
    rows = compare(network(), X, compile=True).rows
    assert [bool(row.failure) for row in rows[:5]] == [False, False, False, True, True]


class Named(nn.Module):
    """Takes keywords, returns a dictionary with other things than tensors in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, ids: Tensor, *, scale: Tensor | None = None, labels: Tensor | None = None) -> dict[str, object]:
        y = self.bn(torch.nn.functional.one_hot(ids, 4).to(self.bn.weight.dtype))
        if scale is not None:
            y = y * scale
        return {"logits": y, "ids": ids, "note": "text", "nested": [y.relu()]}


def test_dictionaries_and_keywords() -> None:
    ids = torch.arange(12) % 4
    found = compare(Named(), ids, scale=torch.rand(12, 4))
    assert not found.failed and "12 int64, 12x4 float32" in found.title


def test_a_loss_is_called_with_the_outputs() -> None:
    seen = []

    def loss(outputs: dict[str, Tensor]) -> Tensor:
        seen.append(outputs["note"])
        return outputs["logits"].sum(0)[0]

    assert not compare(Named(), torch.arange(12) % 4, loss=loss).failed
    assert set(seen) == {"text"}


def test_mean_square() -> None:
    outputs = {"a": torch.tensor([1.0, 3.0]), "b": [torch.tensor([2]), torch.tensor(2.0, dtype=torch.float16)]}
    assert mean_square(outputs).item() == 9
    with pytest.raises(TypeError, match="no tensor of a floating type in the dict that it returns: give loss="):
        mean_square({"b": torch.tensor([2])})


@pytest.mark.parametrize("result", ["outputs", "gradients", "buffers"])
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch, result: str) -> None:
    right = bn_ext.BatchNorm2d.forward

    class Skewed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, y: Tensor) -> Tensor:
            return y.view_as(y)

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            return dy * 1.001

    def wrong(self: bn_ext.BatchNorm2d, input: Tensor) -> Tensor:
        y = right(self, input)
        if result == "buffers":
            self.running_mean += 1e-3
        return {"outputs": y * 1.001, "gradients": Skewed.apply(y), "buffers": y}[result]

    monkeypatch.setattr(bn_ext.BatchNorm2d, "forward", wrong)
    found = compare(network(), X)
    converted = found.rows[1]
    assert found.failed and converted.seconds is None and converted.error > 1e-5
    assert re.match(f"other results: {result[:6]}.* is off by .*, where rounding explains ", converted.failure)
    assert converted.failure in str(found)


def test_rounding_that_turns_a_branch_around_is_no_failure() -> None:
    """Another sign of almost zero is half of this model's output."""

    class Chaotic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            return (y - y.detach() + (y.detach() * 1e7).sin()) * y

    for seed in range(3):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(seed))
        assert not compare(Chaotic(), x).failed


def test_a_model_that_has_no_float64() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)
            self.table = torch.randn(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) @ self.table

    found = compare(Single(), torch.randn(8, 4))
    assert not found.failed and "In float64 the model raises RuntimeError: errors are differences to torch." in str(
        found
    )
    assert found.rows[0].error == 0


def test_without_a_batch_norm() -> None:
    found = compare(nn.Conv2d(3, 4, 3), X)
    assert found.bound is None and "No batch norm was found in it: there is nothing to gain." in str(found)


def test_a_way_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module) -> nn.Module:
        raise RuntimeError("no capture\nat all")

    monkeypatch.setattr(module, "fuse", fail)
    found = compare(network(), X)
    assert found.failed and found.rows[2].failure == "failed: RuntimeError: no capture" and found.bound


def test_the_plain_models_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        compare(network(), torch.randn(2, 5, 9, 9))
    with pytest.raises(TypeError, match=r"bn_ext\.compare: model should be a torch.nn.Module, got an object of list"):
        compare([])


def test_the_bound_in_words() -> None:
    assert "takes about 20 % of this model's step: no batch norm can give more than 1.25x here." in _in_words(1.25)
    assert "takes less than 1 % of this model's step." in _in_words(1.001)


def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bn_ext\.compare: the model is not initialized, call it first"):
        compare(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), X)


def test_frozen_and_autocast() -> None:
    frozen = network()
    frozen[1].eval().requires_grad_(False)
    assert not compare(frozen, X).failed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = compare(network(), X, autocast=torch.bfloat16)
    assert not found.failed and "autocast to bfloat16" in found.title and found.rows[0].error > 1e-4


def test_differences() -> None:
    assert difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 0.5
    assert difference(torch.tensor([math.inf, math.nan, 1.0]), torch.tensor([math.inf, math.nan, 1.0])) == 0
    assert difference(torch.tensor([math.nan]), torch.tensor([9.0])) == math.inf
    assert difference(torch.tensor([3.0]), torch.tensor([3.0, 4.0])) == math.inf
    assert difference(torch.tensor([1 + 2j]), torch.tensor([1 + 1j])) == 1
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 5])) == 3


def test_the_share_of_ours_is_between_none_and_all() -> None:
    x = torch.randn(8, 16, 32, 32)
    bn = bn_ext.BatchNorm2d(16)
    assert 0.05 < profiling.share_of_ours(lambda: bn(x).sum().backward(), "cpu") < 1
    assert profiling.share_of_ours(x.relu, "cpu") == 0
    large = torch.randn(8, 16, 256, 256)
    with torch.no_grad():  # nearly all of it in an operator that calls another of ours
        assert 0.5 < profiling.share_of_ours(lambda: bn(large), "cpu") <= 1


def test_the_profiler_is_silent_but_nothing_else_is(capfd: pytest.CaptureFixture[str]) -> None:
    import os

    profiling.allocated(lambda: os.write(2, b"heard\n"), "cpu")
    assert capfd.readouterr().err == "heard\n"


def test_memory_of_an_earlier_step_is_not_freed_by_a_later_one() -> None:
    def leave() -> None:
        cycle: list[object] = [torch.empty(1000)]
        cycle.append(cycle)

    def collect() -> None:
        gc.set_threshold(1)
        assert [[]]

    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)
    try:
        found = [profiling.allocated(step, "cpu")[0] for step in (leave, collect)]
    finally:
        gc.set_threshold(*thresholds)
    assert found == [4000, 0]


def wrong_in_ours(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    right = bn_ext.BatchNorm2d.forward
    monkeypatch.setattr(bn_ext.BatchNorm2d, "forward", lambda self, x: change(right(self, x)))


def slightly(y: Tensor) -> Tensor:
    return y * 1.01


class Beside(nn.Module):
    """Returns, or holds, something beside its batch norm in which an error of the batch norm would drown."""

    def __init__(self, returned: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.bn, self.returned = nn.BatchNorm2d(3), returned
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("table", torch.full((100, 100), 1e3))

    def forward(self, x: Tensor) -> object:
        return self.returned(self.bn(x))


@dataclass
class Wrapped:
    inner: dict[str, Tensor]


@pytest.mark.parametrize(
    "returned",
    [
        lambda y: (y, torch.full_like(y, 1e6)),
        lambda y: (y, torch.full_like(y, math.inf)),
        lambda y: {"complex": torch.complex(y, y)},
        lambda y: (y * 100).long(),
        lambda y: Wrapped({"y": y}),
    ],
    ids=["beside a large one", "beside an infinite one", "complex", "integers", "in a dataclass"],
)
def test_an_error_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch, returned: Callable) -> None:
    assert not compare(Beside(returned), X, training=False).failed
    wrong_in_ours(monkeypatch, slightly)
    assert compare(Beside(returned), X, training=False).rows[1].failure.startswith("other results: output")


def test_a_buffer_that_is_wrong_beside_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bn_ext.BatchNorm2d.forward

    def without_counting(self: bn_ext.BatchNorm2d, x: Tensor) -> Tensor:
        before = self.num_batches_tracked.clone()
        y = right(self, x)
        self.num_batches_tracked.copy_(before)
        return y

    assert not compare(Beside(lambda y: y), X).failed
    monkeypatch.setattr(bn_ext.BatchNorm2d, "forward", without_counting)
    assert "buffer bn.num_batches_tracked" in compare(Beside(lambda y: y), X).rows[1].failure


def test_the_gradient_of_an_input_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    x = X.clone().requires_grad_()
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False))
    right = bn_ext.BatchNorm2d.forward

    def cubes(y: Tensor) -> Tensor:
        return y.pow(3).sum()

    assert not compare(model, x, loss=cubes).failed

    def wrong(self: bn_ext.BatchNorm2d, input: Tensor) -> Tensor:
        y = right(self, input)
        return y + (1.01 * y - y.detach() * 1.01) - (y - y.detach())

    monkeypatch.setattr(bn_ext.BatchNorm2d, "forward", wrong)
    assert "gradient of input 0" in compare(model, x, loss=cubes).rows[1].failure


def test_where_torch_is_infinitely_off_nothing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).half()
    x = (X * 1e4).half()
    x[0, 0, 0, 0] = math.inf
    wrong_in_ours(monkeypatch, lambda y: torch.full_like(y, 7))
    assert compare(model, x, training=False).rows[1].failure.startswith("other results")


def test_float64_is_judged_by_its_own_roundings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network().double(), X.double()
    assert not compare(model, x).failed
    wrong_in_ours(monkeypatch, lambda y: y * (1 + 1e-9))
    assert compare(model, x).failed


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.mul_(0.5))


def test_inputs_and_their_gradients_are_left_alone() -> None:
    x = X.clone()
    found = bn_ext.compare(InPlace(), x, seconds=0.05)
    assert not found.failed and torch.equal(x, X)
    x.requires_grad_().grad = torch.ones_like(x)
    assert not compare(network(), x * 1).failed
    assert not compare(network(), x).failed
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_step_begins_with_the_inputs_that_were_given() -> None:
    trial = Trial(InPlace(), Call((X,), {}, mean_square, None, torch.device("cpu")))
    first, second = trial.step(), trial.step()
    torch.testing.assert_close(first, second)
    first = trial.results()["gradient of bn.weight"]
    trial.model.load_state_dict(InPlace().state_dict())
    assert torch.equal(trial.results()["gradient of bn.weight"], first)


def test_numpys_random_numbers_are_the_same_for_all_and_left_alone() -> None:
    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) * np.random.rand() * random.random()

    before = np.random.get_state()[1].copy(), random.getstate()
    assert not compare(Drawing(), X).failed
    assert (np.random.get_state()[1] == before[0]).all() and random.getstate() == before[1]


def test_without_gradients_around_it() -> None:
    with torch.no_grad():
        assert not compare(network(), X).failed
    with torch.inference_mode():
        assert not compare(network(), X.clone()).failed
    with pytest.raises(ValueError, match="nothing in the model needs a gradient: compare with training=False"):
        compare(network().requires_grad_(False), X)
    with pytest.raises(TypeError, match="loss should return a tensor, got an object of NoneType"):
        compare(network(), X, loss=lambda outputs: None)


def test_the_bound_is_not_below_what_folding_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model whose calls cost more than its kernels, the step whose batch norms do nothing is the bound."""
    right = bn_ext.BatchNorm2d.forward
    plain = nn.BatchNorm2d.forward

    def slow(self: nn.BatchNorm2d, x: Tensor) -> Tensor:
        time.sleep(0.02)  # not in a kernel
        return plain(self, x)

    monkeypatch.setattr(nn.BatchNorm2d, "forward", slow)
    monkeypatch.setattr(bn_ext.BatchNorm2d, "forward", lambda self, x: (time.sleep(0.02), right(self, x))[1])
    found = compare(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), X, training=False)
    assert found.bound > 3


def test_a_comparison_shows_itself() -> None:
    found = Comparison("title")
    assert repr(found) == str(found) == "title"


def test_importing_does_not_load_the_compiler() -> None:
    code = "import sys, bn_ext; sys.exit('torch._dynamo' in sys.modules and 'torch._inductor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
