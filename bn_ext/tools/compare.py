"""Whether a model is faster with our batch norms, by how much, at what error, and what it could be at most."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bn_ext import activation as activations
from bn_ext.functional import finished
from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion.classes import is_batch_norm, is_ours
from bn_ext.graph.conversion.convert import convert, revert
from bn_ext.graph.fusion.fuse import fuse
from bn_ext.graph.report import report
from bn_ext.nn.base import FusedForward
from bn_ext.tools.comparison import COMPILED, COMPILED_OURS, CONVERTED, FUSED, TORCH, WITHOUT, Comparison, Row
from bn_ext.tools.judge import Judge
from bn_ext.tools.machine import Others, described, name_of, where
from bn_ext.tools.timing import interleave, percentiles, ratios, sampler
from bn_ext.tools.trial import Call, Loss, Trial, mean_square, seeded

ROUNDS = 7  # at the least


def compare(
    model: nn.Module,
    /,
    *args: Any,
    loss: Loss | None = None,
    training: bool | None = None,
    autocast: torch.dtype | None = None,
    compile: bool = False,
    seconds: float = 10.0,
    **kwargs: Any,
) -> Comparison:
    """Runs ``model`` as it is, converted and fused, in turn, and says how the three differ.

    In training a step is forward, loss and backward, without an optimizer; in evaluation it is the forward without
    gradients. Before anything is timed, outputs, gradients and running statistics of one step are compared with the
    same model's in float64, tensor by tensor: a way whose error is larger than torch's own explains is reported and not
    timed. All ways run on copies of ``model`` and its inputs, and on threads, device, dtype and layout as they are. In
    the first row modules of ours run on torch's operators.

    Args:
        model: any module that can be copied.
        args, kwargs: its inputs; positional ones and keywords, but for those named below.
        loss: of the outputs, in training; the mean square of every floating-point output unless given.
        training: the mode of all modules, as by ``model.train(training)``; as they are unless given.
        autocast: run under :class:`torch.autocast` with this dtype.
        compile: compare ``torch.compile``, without us and with us, too. So that results can be compared, what is
            compiled draws random numbers as eager code does (``torch._inductor.config.fallback_random``).
        seconds: of measurement, at the least; there are at least seven rounds.

    Returns:
        What to print: for each way the time of a step, the speed-up over torch (in brackets the 20th and the 80th
        percentile of the rounds), the memory that the forward keeps for the backward and the peak of the step (inputs,
        parameters and buffers not counted), and the error: the norm of the difference to float64 over the norm, of
        outputs, gradients or statistics, whichever is largest.

    Raises:
        TypeError: ``model`` is no module, or returns no floating-point tensor and there is no ``loss``.
        ValueError: a module is lazy and not initialized, or nothing needs a gradient in training.
        Exception: whatever the plain model raises.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(bn_ext.compare(model, torch.randn(4, 3, 32, 32)))  # doctest: +SKIP
    """
    check_model("compare", model)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("bn_ext.compare: the model is not initialized, call it first")
    model = copy.deepcopy(getattr(model, "_orig_mod", model))  # what torch.compile returns holds the model
    if training is not None:
        model.train(training)
    call = Call(args, kwargs, loss or mean_square, autocast, torch.device("cpu"))
    tensors = [*model.parameters(), *call.inputs()]
    call = call._replace(device=tensors[0].device if tensors else call.device)
    settings = _compiler() if compile else nullcontext()
    with torch.inference_mode(False), seeded(), settings, _Progress() as progress:
        return _Comparing(model, call, progress).run(compile, seconds)


class _Comparing:
    def __init__(self, model: nn.Module, call: Call, progress: Callable[[str], None]) -> None:
        self.model, self.call, self.progress = model, call, progress
        self.trials: dict[str, Trial] = {}
        self.comparison = Comparison(_title(model, call))

    def run(self, compile: bool, seconds: float) -> Comparison:
        self.progress("running the model in float64")
        self.judge = Judge(_by_torch(copy.deepcopy(self.model)), self.call)
        ways: dict[str, Callable[[nn.Module], nn.Module]] = {TORCH: _by_torch, CONVERTED: _converted, FUSED: _fused}
        if compile:
            ways |= {COMPILED: _compiled, COMPILED_OURS: _compiled_with_ours}
        for name, prepare in ways.items():
            self.progress(f"checking {name}")
            self.comparison.rows.append(self.checked(name, prepare))
        if any(map(is_batch_norm, self.model.modules())):
            self.comparison.rows.append(self.without_batch_norm())
        others = Others()
        samples = self.timed(seconds)
        noise = others.notes()
        self.comparison.bound = self.bound(samples)
        notes = self.comparison.notes
        if self.comparison.bound is None:
            notes.append("No batch norm was found in it: there is nothing to gain.")
        if self.judge.note:
            notes.append(self.judge.note)
        if compile and {COMPILED, COMPILED_OURS} <= samples.keys():
            gain = median(ratios(samples, COMPILED, COMPILED_OURS))
            notes.append(f"With torch.compile on both sides: {gain:.2f}x.")
        notes += noise
        return self.comparison

    def checked(self, name: str, prepare: Callable[[nn.Module], nn.Module]) -> Row:
        row = Row(name)
        try:
            trial = Trial(prepare(copy.deepcopy(self.model)), self.call)
            results = trial.results()
            row.error, row.failure = self.judge.error(results), self.judge.fault(results)
            row.remark = _remark(name, trial.model)
            row.kept, row.peak = trial.memory()
        except Exception as failure:
            if name == TORCH:
                raise
            row.failure = f"failed: {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        if not row.failure:
            self.trials[name] = trial
        return row

    def without_batch_norm(self) -> Row:
        """Runs the model's step with batch norms that do nothing. Its results are of no account."""
        model = _by_torch(copy.deepcopy(self.model))
        for module in filter(is_batch_norm, model.modules()):
            module.forward = _first  # type: ignore[method-assign]
        self.trials[WITHOUT] = Trial(model, self.call)
        try:
            self.trials[WITHOUT].step()
        except Exception as failure:
            del self.trials[WITHOUT]
            return Row(WITHOUT, failure=f"does not run: {type(failure).__name__}", counts=False)
        return Row(WITHOUT, "batch norms give what they get: other results", counts=False)

    def timed(self, seconds: float) -> dict[str, list[float]]:
        self.progress(f"timing, {seconds:.0f} s or longer")
        samples, times = interleave(
            {name: trial.step for name, trial in self.trials.items()}, seconds, ROUNDS, sampler(self.call.device)
        )
        self.comparison.title += f", {len(samples[TORCH])} rounds" + (f" of {times} steps" if times > 1 else "")
        for row in self.comparison.rows:
            if row.name in samples:
                row.seconds = median(samples[row.name])
                row.speedup = percentiles(ratios(samples, TORCH, row.name))
        return samples

    def bound(self, samples: dict[str, list[float]]) -> float | None:
        """About the speed-up that a batch norm without any cost would give; None if there is no batch norm.

        The largest of three estimates: the step without our operators' share, torch's step less the time of our
        operators, and the step whose batch norms do nothing.
        """
        bounds = [median(ratios(samples, TORCH, WITHOUT))] if WITHOUT in samples else []
        for name in {CONVERTED, FUSED} & samples.keys():
            share, speedup = self.trials[name].share_of_ours(), median(ratios(samples, TORCH, name))
            if share:
                bounds += [speedup / (1 - share), *[1 / (1 - share / speedup)] * (share < speedup)]
        return max(1.0, *bounds) if bounds else None


def _first(input: Any, *_: Any, **__: Any) -> Any:
    return input


# The modules whose classes torch has a counterpart of: other classes of bn_ext.nn normalize by other statistics.
_LIKE_TORCHS = ("bn_ext.nn.batch_norm", "bn_ext.nn.activated")


def _by_torch(model: nn.Module) -> nn.Module:
    """With torch's classes, or torch's operators in the calls of ours that torch's classes have no arguments for."""
    for module in model.modules():
        if isinstance(module, FusedForward) and type(module).__module__ in _LIKE_TORCHS:
            module.forward = partial(_separately, module)  # type: ignore[method-assign]
    return revert(model)


def _separately(
    module: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    activation: activations.Name | None = None,
    activation_param: float | None = None,
) -> Tensor:
    activation = getattr(module, "activation", activation)
    activation_param = getattr(module, "activation_param", activation_param)
    return finished(_BatchNorm.forward(module, input), residual, activation, activation_param)  # type: ignore[arg-type]


@contextmanager
def _compiler() -> Iterator[None]:
    """Makes compiled code draw the random numbers that eager code draws, and keeps the code of every copy."""
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    with inductor.patch(fallback_random=True), dynamo.patch(recompile_limit=64):
        yield


def _converted(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():  # the remark says it
        warnings.simplefilter("ignore")
        return convert(model)


def _fused(model: nn.Module) -> nn.Module:
    return fuse(model)


def _compiled(model: nn.Module, backend: str = "inductor") -> nn.Module:
    forward = model.forward

    # A function of this file: ``model.compile()`` compiles nothing where the forward is torch's own, as Sequential's.
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # an object of its own, by which Dynamo keeps what it compiles
    model.forward = torch.compile(call, backend=backend)
    return model


def _compiled_with_ours(model: nn.Module) -> nn.Module:
    return _compiled(_converted(model), "bn_ext_inductor")


def _remark(name: str, model: nn.Module) -> str:
    if name == CONVERTED:
        norms = [module for module in model.modules() if is_batch_norm(module)]
        return f"{sum(map(is_ours, norms))} of {len(norms)} batch norms converted" if norms else ""
    if name == FUSED:
        rows = [row for row in report(model).rows if not row.runs_on.startswith("folded")]
        return (
            f"{sum(bool(row.fused) for row in rows)} of {len(rows)} batch norms fused with what follows" if rows else ""
        )
    return ""


def _title(model: nn.Module, call: Call) -> str:
    inputs = ", ".join(map(described, call.inputs()))
    parts = [f"{type(model).__name__} on {inputs}", "training step" if model.training else "inference"]
    if call.autocast is not None:
        parts.append(f"autocast to {name_of(call.autocast)}")
    parts.append(where(call.device))
    return ", ".join(parts)


class _Progress:
    """One line on a terminal, which says what is being done and is gone in the end."""

    def __enter__(self) -> Callable[[str], None]:
        return self._show

    def _show(self, doing: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[Kbn_ext.compare: {doing} ...", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
