"""Whether a model is faster with our batch norms, by how much, at what error, and what it could be at most."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from bn_ext.graph.arguments import check_model
from bn_ext.graph.conversion.classes import is_batch_norm, is_ours
from bn_ext.graph.conversion.convert import convert, revert
from bn_ext.graph.fusion.fuse import fuse
from bn_ext.graph.report import report
from bn_ext.tools.comparison import COMPILED, COMPILED_OURS, CONVERTED, FUSED, TORCH, Comparison, Row
from bn_ext.tools.machine import Others, described, name_of, where
from bn_ext.tools.timing import interleave, percentiles, ratios, sampler
from bn_ext.tools.trial import Call, Judge, Loss, Trial, mean_square, seeded

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
    same model's in float64: a way whose error is larger than torch's own explains is reported and not timed. All ways
    run on copies of ``model`` and on threads, device, dtype and layout as they are. Modules of ours in ``model`` are
    torch's in the first row, but for :class:`bn_ext.BatchNormAct2d` and its kin, which torch has no class for.

    Args:
        model: any module that can be copied.
        args, kwargs: its inputs; positional ones and keywords.
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
        ValueError: a module is lazy and not initialized.
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
    tensors = [t for t in (*model.parameters(), *tree_leaves((args, kwargs))) if isinstance(t, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    call = Call(args, kwargs, loss or mean_square, autocast, device)
    with seeded(device), _compiler() if compile else nullcontext(), _Progress() as progress:
        return _Comparing(model, call, progress).run(compile, seconds)


class _Comparing:
    def __init__(self, model: nn.Module, call: Call, progress: Callable[[str], None]) -> None:
        self.model, self.call, self.progress = model, call, progress
        self.trials: dict[str, Trial] = {}
        self.comparison = Comparison(_title(model, call))

    def run(self, compile: bool, seconds: float) -> Comparison:
        self.progress("running the model in float64")
        self.judge = Judge(revert(copy.deepcopy(self.model)), self.call)
        ways: dict[str, Callable[[nn.Module], nn.Module]] = {TORCH: revert, CONVERTED: _converted, FUSED: _fused}
        if compile:
            ways |= {COMPILED: _compiled, COMPILED_OURS: _compiled_with_ours}
        for name, prepare in ways.items():
            self.progress(f"checking {name}")
            self.comparison.rows.append(self.checked(name, prepare))
        others = Others()
        samples = self.timed(seconds)
        noise = others.notes()
        self.comparison.bound = self.bound(samples)
        notes = self.comparison.notes
        if self.comparison.bound is None:
            notes.append("It calls no batch norm of ours: there is nothing to gain.")
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
            row.error, row.failure = self.judge(trial)
            row.remark = _remark(name, trial.model)
            row.kept, row.peak = trial.memory()
        except Exception as failure:
            if name == TORCH:
                raise
            row.failure = f"failed: {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        if not row.failure:
            self.trials[name] = trial
        return row

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
        """The speed-up if our operators took no time; None if none is called."""
        shares = {name: self.trials[name].share_of_ours() for name in (CONVERTED, FUSED) if name in self.trials}
        bounds = [median(ratios(samples, TORCH, name)) / (1 - share) for name, share in shares.items() if share]
        return max(1.0, *bounds) if bounds else None


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


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def _compiled_with_ours(model: nn.Module) -> nn.Module:
    model = _converted(model)
    model.compile(backend="bn_ext_inductor")
    return model


def _remark(name: str, model: nn.Module) -> str:
    if name == CONVERTED:
        norms = [module for module in model.modules() if is_batch_norm(module)]
        return f"{sum(map(is_ours, norms))} of {len(norms)} batch norms converted"
    if name == FUSED:
        rows = report(model).rows
        return f"{sum(bool(row.fused) for row in rows)} of {len(rows)} batch norms fused with what follows"
    return ""


def _title(model: nn.Module, call: Call) -> str:
    tensors = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    inputs = ", ".join(map(described, tensors))
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
