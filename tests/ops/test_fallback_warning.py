"""Calls that torch's own operators answer say so, if asked to."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator

import forked
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn

import bn_ext
from bn_ext.functional import batch_norm
from bn_ext.graph.conversion.forwards import FrozenBatchNorm2d


class Frozen(FrozenBatchNorm2d):
    """bn_ext.convert makes this of torchvision's class."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(3))


class Function(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True)


@pytest.fixture
def asked() -> Iterator[None]:
    torch._dynamo.reset()  # what other tests compiled, or failed to, would decide whether this is compiled
    bn_ext.set_warn_fallback(True)
    yield
    bn_ext.set_warn_fallback(False)


def example(**options) -> Tensor:
    return torch.randn(2, 3, 4, 5, **options)


def ours() -> nn.Module:
    return bn_ext.BatchNorm2d(3)


def warned(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    """Lists the warnings of ``call`` about batch norms."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [one for one in caught if "batch norm" in str(one.message)]


def shared() -> nn.Module:
    return bn_ext.nn.SharedBatchNorm2d(3, 1)


def shared_gradient_recorded() -> None:
    module = shared()
    torch.autograd.grad(module(example()).square().sum(), module.weight, create_graph=True)


def with_tangents() -> None:
    with fwAD.dual_level():
        ours()(fwAD.make_dual(example(), example()))


def with_inference_tensors() -> None:
    with torch.inference_mode():
        bias = torch.zeros(3)
    batch_norm(example(), None, None, torch.ones(3, requires_grad=True), bias, training=True, activation="silu")


def gradient_recorded() -> None:
    module = ours()
    torch.autograd.grad(module(example()).square().sum(), module.weight, create_graph=True)


def gradient_transformed() -> None:
    module = ours()
    output = module(example())
    torch.func.vmap(lambda dy: torch.autograd.grad(output, module.weight, dy, retain_graph=True))(example()[None])


def counting_in_int32() -> None:
    module = ours()
    module.num_batches_tracked = torch.tensor(0, dtype=torch.int32)
    module(example())


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "residual": (lambda: ours()(example(), torch.zeros(3, 1, 1)), "the residual differs from the input in sizes"),
    "residual of another type": (lambda: ours()(example(), example(dtype=torch.float64)), "the residual differs"),
    "vmap": (lambda: torch.func.vmap(ours().eval())(example()[None]), "torch.func has to see through it"),
    "grad": (lambda: torch.func.grad(lambda x: ours()(x).sum())(example()), "torch.func has to see through it"),
    "composed, traced": (
        lambda: torch.jit.trace(shared(), (example(),), check_trace=False),
        "torch.func, forward-mode AD or a trace has to see through it",
    ),
    "composed, export": (
        lambda: torch.export.export(shared(), (example(),), strict=False),
        "it is exported, for others to run",
    ),
    "composed, residual": (lambda: shared()(example(), torch.zeros(3, 1, 1)), "the residual differs from the input"),
    "composed, second derivative": (shared_gradient_recorded, "its gradient may be differentiated again"),
    "forward mode": (with_tangents, "has a tangent of forward-mode AD"),
    "inference tensors": (with_inference_tensors, "no tensor that was made in inference mode"),
    "second derivative": (gradient_recorded, "its gradient may be differentiated again"),
    "transformed gradient": (gradient_transformed, "torch.func or forward-mode AD differentiates its gradient"),
    "mkldnn": (lambda: ours().eval()(example().to_mkldnn()), "the input is not strided"),
    "nothing": (lambda: batch_norm(torch.empty(0), None, None, training=True), "fewer than two dimensions"),
    "counter": (counting_in_int32, "the counter of batches is not int64"),
    "export": (lambda: torch.export.export(ours(), (example(),), strict=False), "it is exported, for others to run"),
    "export of the function": (
        lambda: torch.export.export(Function(), (example(),), strict=False),
        "it is exported, for others to run",
    ),
    "export of a frozen one": (
        lambda: torch.export.export(Frozen(), (example(),), strict=False),
        "it is exported, for others to run",
    ),
    "frozen, of another type": (lambda: Frozen()(example(dtype=torch.float64)), "of the frozen tensors' dtype"),
    "frozen, of another rank": (lambda: Frozen()(example()[0]), "the input is not (N, C, H, W)"),
    "compiled": (
        lambda: torch.compile(ours(), backend="aot_eager", fullgraph=True)(example(), torch.zeros(3, 1, 1)),
        "the residual differs",
    ),
    "scripted": (lambda: torch.jit.script(ours())(example(), torch.zeros(3, 1, 1)), "the residual differs"),
}


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_falls_back_says_why(case: str) -> None:
    call, reason = CALLS[case]
    first, *others = warned(call)
    assert first.category is UserWarning
    assert reason in str(first.message)
    assert first.filename == __file__, "the line of the user's code is named, not one of torch's"
    assert {str(other.message) for other in others} <= {str(first.message)}
    bn_ext.set_warn_fallback(False)
    assert warned(call) == []


@pytest.mark.usefixtures("asked")
def test_the_call_is_described() -> None:
    (one,) = warned(lambda: ours()(example(), torch.zeros(3, 1, 1)))
    assert str(one.message) == (
        "bn_ext: batch norm of torch.float32 (2, 3, 4, 5) on cpu is normalized by our kernels, and finished by torch's "
        "own operators: the residual differs from the input in sizes, dtype, device or layout"
    )


RUNS, FINISHED, DIFFERENTIATED = "runs on", "is normalized by our kernels, and finished by", "is differentiated by"


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("residual", FINISHED),
        ("composed, residual", FINISHED),
        ("composed, second derivative", DIFFERENTIATED),
        ("inference tensors", FINISHED),
        ("counter", FINISHED),
        ("grad", RUNS),
        ("export", RUNS),
        ("second derivative", DIFFERENTIATED),
        ("transformed gradient", DIFFERENTIATED),
    ],
)
def test_a_warning_says_what_torch_does(case: str, how: str) -> None:
    call, _ = CALLS[case]
    assert all(f"on cpu {how} torch's own operators: " in str(one.message) for one in warned(call))


def step(module: Callable, x: Tensor) -> None:
    module(x).square().sum().backward()


@pytest.mark.usefixtures("asked")
def test_calls_of_kernels_are_silent() -> None:
    assert warned(lambda: step(ours(), example())) == []
    assert warned(lambda: step(torch.compile(ours(), backend="aot_eager", fullgraph=True), example())) == []
    assert warned(lambda: ours().eval()(example())) == []
    assert warned(lambda: ours()(example(), example(), activation="gelu")) == []
    assert warned(lambda: shared()(example(), example(), activation="gelu")) == []
    assert warned(lambda: ours().to("meta")(example(device="meta"))) == []
    assert warned(lambda: Frozen()(example())) == []
    assert warned(lambda: torch.fx.symbolic_trace(Frozen())) == []


@pytest.mark.usefixtures("asked")
def test_what_dynamo_captures_stays_whole() -> None:
    """It captures no warning: there is none, as docs/fallbacks.md says."""
    module = torch.compile(Frozen(), backend="eager", fullgraph=True)
    assert warned(lambda: module(example(dtype=torch.float64))) == []
    assert warned(lambda: torch.export.export(ours(), (example(),), strict=True)) == []


@pytest.mark.usefixtures("asked")
def test_as_an_error_it_leaves_everything_as_it_was() -> None:
    module = ours()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the residual differs"):
            module(example(), torch.zeros(3, 1, 1))
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(UserWarning, match="its gradient may be differentiated again"):
            torch.autograd.grad(module(example()).square().sum(), module.weight, create_graph=True)


@pytest.mark.usefixtures("asked")
def test_wrong_arguments_are_errors_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NotImplementedError):
            ours()(torch.ones(2, 3, 4, 5, dtype=torch.int64), torch.zeros(3, 1, 1))


@pytest.mark.parametrize(("value", "warns"), [("1", True), ("0", False), (None, False)])
def test_the_environment(value: str | None, warns: bool) -> None:
    code = "import torch, bn_ext; bn_ext.BatchNorm2d(3)(torch.randn(2, 3, 4, 5), torch.zeros(3, 1, 1))"
    environment = dict(os.environ)
    environment.pop("BN_EXT_WARN_FALLBACK", None)
    if value is not None:
        environment["BN_EXT_WARN_FALLBACK"] = value
    run = forked.run(code, environment=environment)
    assert run.returncode == 0, run.stderr
    assert ("UserWarning: bn_ext: batch norm of" in run.stderr) == warns
