"""The command line: a shape measured, a model compared, arguments that are wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bn_ext import activation
from bn_ext.tools import bench as module
from bn_ext.tools import command
from bn_ext.tools.bench import Pattern

MODELS = """\
from torch import nn
def small(channels=4, *, kernel=3):
    return nn.Sequential(nn.Conv2d(3, channels, kernel), nn.BatchNorm2d(channels), nn.ReLU())
class holder:
    small = small
made = small()
number = lambda: 3
three = 3
needs = lambda channels: small(channels)
takes = lambda **kwargs: small()
lazy = lambda: nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d(), nn.ReLU())
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newcomers_models.py").write_text(MODELS)
    (tmp_path / "newcomers_broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "newcomers_models", raising=False)


@pytest.mark.parametrize(
    "spelled", ["small", "small(5)", "small(channels=5, kernel=1)", "holder.small", "made", "lazy"]
)
def test_compare(models: None, capsys: pytest.CaptureFixture[str], spelled: str) -> None:
    assert command.main(["compare", f"newcomers_models:{spelled}", "2x3x8x8", "--seconds", "0"]) == 0
    printed = capsys.readouterr()
    assert "Sequential on 2x3x8x8 float32, training step" in printed.out
    assert "1 of 1 batch norms fused" in printed.out and printed.err == ""


def test_compare_with_options(models: None, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    options = ["--channels-last", "--eval", "--dtype", "float64", "--threads", "1", "--seconds", "0"]
    try:
        assert command.main(["compare", "newcomers_models:small", "2x3x8x8", *options]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "2x3x8x8 float64 channels last, inference, 1 thread," in capsys.readouterr().out


def test_inputs_that_a_model_cannot_take(models: None, capsys: pytest.CaptureFixture[str]) -> None:
    for shape in ("2x4x8x8", "1x3x3x3"):  # of other channels, and with one value per channel
        assert command.main(["compare", "newcomers_models:small", shape]) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("python -m bn_ext compare: newcomers_models:small raises ") and errors.count("\n") == 1


def test_compare_fails_where_results_differ(
    models: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bn_ext.tools.compare.convert", lambda model: model.append(torch.nn.Sigmoid()))
    assert command.main(["compare", "newcomers_models:small", "2x3x8x8", "--seconds", "0"]) == 1
    assert "other results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("newcomers_models", "expected package.module:callable, got newcomers_models"),
        ("newcomers_models:small(", "expected package.module:callable"),
        ("newcomers_models:small(x)", "expected package.module:callable"),
        ("newcomers_models:large", "newcomers_models has no large"),
        ("newcomers_models:number", "gives an object of int, expected a torch.nn.Module"),
        ("no_such_package:f", "no_such_package:f raises ModuleNotFoundError: No module named 'no_such_package'"),
        ("newcomers_broken:f", "newcomers_broken:f raises SyntaxError: "),
        ("newcomers_models:three", "newcomers_models:three raises TypeError: 'int' object is not callable"),
        ("newcomers_models:needs", "raises TypeError: <lambda>() missing 1 required positional argument: 'channels'"),
        ("newcomers_models:needs(-1)", "newcomers_models:needs(-1) raises RuntimeError: "),
        ('newcomers_models:takes(**{"a": 1})', "expected package.module:callable"),
        ("newcomers_models:takes(a={[]})", "expected package.module:callable"),
        (":small", "expected package.module:callable, got :small"),
        (".newcomers_models:small", "expected package.module:callable, got .newcomers_models:small"),
        ("./newcomers_models.py:small", "expected package.module:callable, got ./newcomers_models.py:small"),
    ],
)
def test_models_that_are_none(models: None, capsys: pytest.CaptureFixture[str], model: str, message: str) -> None:
    assert command.main(["compare", model, "2x3x8x8"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("python -m bn_ext compare: ") and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "4xa"], "expected sizes as in 8x3x224x224, got 4xa"),
        (["bench", "4x0"], "expected positive sizes, got 4x0"),
        (["bench", "4x3", "--activation", "rule"], "invalid choice: 'rule'"),
        *((["bench", "4x3", "--threads", n], f"processors here, got {n}\n") for n in ("0", "-1", "a", "99999999999")),
        (["bench", "4x3", "--device", "foo"], "cannot compute on foo: "),
        (["bench", "4x3", "--device", "meta"], "cannot compute on meta: "),
        (["compare", "m:f", "4x3", "--device", "cuda:99"], "cannot compute on cuda:99: "),
        (["compare", "m:f", "4x3", "--autocast", "float64"], "invalid choice: 'float64'"),
        (["measure"], "invalid choice: 'measure'"),
    ],
)
def test_arguments_that_are_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_bench_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench", "4x3", "--channels-last"]) == 2
    assert "channels last has four or five dimensions, got 4x3" in capsys.readouterr().err
    assert command.main(["bench", "4"]) == 2
    assert "a shape has two dimensions or more, got 4" in capsys.readouterr().err
    for shape in ("1x3", "1x3x1x1"):
        assert command.main(["bench", shape]) == 2
        assert f"training takes more than one value per channel, got {shape}\n" in capsys.readouterr().err


def test_bench_runs_as_a_command() -> None:
    line = [sys.executable, "-m", "bn_ext", "bench", "4x3x5x5", "--residual", "--activation", "relu", "--seconds", "0"]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    title, head, *rows = run.stdout.splitlines()
    assert title.startswith("relu(batch_norm(x) + residual), x of 4x3x5x5 float32, ") and "of a copy's rate" in head
    assert [row.split("  ")[0] for row in rows[:4]] == ["forward", "backward", "forward + backward", "inference"]


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 2, 2, 2, 2)])
@pytest.mark.parametrize("residual", [False, True])
def test_every_rank_and_activation(shape: tuple[int, ...], residual: bool) -> None:
    for name in (None, *activation.NAMES):
        for dtype in (torch.float32, torch.bfloat16):
            channels_last = len(shape) in (4, 5)
            errors = module.Workload(shape, Pattern(name, residual), dtype, channels_last, torch.device("cpu")).check()
            assert all(ours >= 0 for ours, _ in errors.values())


@pytest.mark.parametrize("result", ["output", "running_var", "dx", "inferred"])
def test_bench_refuses_wrong_results(monkeypatch: pytest.MonkeyPatch, result: str) -> None:
    right = module.batch_norm

    def wrong(x: Tensor, mean: Tensor, var: Tensor, *rest: Any) -> Tensor:
        y, training = right(x, mean, var, *rest), rest[2]
        if result == "running_var" and training:
            var += 1e-3
        if result == "dx" and training:
            y.register_hook(lambda dy: dy * 1.001)
        return y * 1.001 if result == ("output" if training else "inferred") else y

    monkeypatch.setattr(module, "batch_norm", wrong)
    with pytest.raises(AssertionError, match=r"bench: \S.* is off by .*, torch's by"):
        module.bench((4, 3, 5, 5), seconds=0)
    assert command.main(["bench", "4x3x5x5", "--seconds", "0"]) == 1


def test_bench_refuses_wrong_results_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would excuse ours."""
    right = Pattern.torchs
    monkeypatch.setattr(Pattern, "torchs", lambda self, *given: right(self, *given) * 1.01)
    with pytest.raises(AssertionError, match=r"bench: forward is off by .*, torch's by"):
        module.bench((4, 3, 5, 5), seconds=0)


@pytest.mark.parametrize(
    ("pattern", "moved"),
    [
        (Pattern(), {"forward": 2, "backward": 3, "forward + backward": 5, "inference": 2}),
        (Pattern("relu", residual=True), {"forward": 3, "backward": 4, "forward + backward": 7, "inference": 3}),
    ],
)
def test_the_rate_beside_a_copy(monkeypatch: pytest.MonkeyPatch, pattern: Pattern, moved: dict[str, int]) -> None:
    """A copy moves two tensors: where it takes twice our time, our rate is the least number that we move."""
    with_gradients = []

    def timed(calls: dict[str, Callable[[], Any]], *_: object) -> tuple[dict[str, list[float]], int]:
        results = calls["bn_ext"]()
        with_gradients.append(isinstance(results, Tensor) and results.requires_grad)
        return {name: [2.0 if name == "copy" else 1.0] * 3 for name in calls}, 1

    monkeypatch.setattr(module, "interleave", timed)
    rows = module.bench((4, 3, 5, 5), pattern).rows
    rate = module._HEAD.index("of a copy's rate")
    assert {row[0]: row[rate] for row in rows} == {passed: f"{100 * n} %" for passed, n in moved.items()}
    assert with_gradients == [True, False, False, False], "inference records none"
