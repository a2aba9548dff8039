"""The call of a fused model: captured by Dynamo, rewritten and run, in the place of the plain one."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from types import CodeType, SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.guards import DeletedGuardManagerWrapper
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, _symbolic_trace
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from bn_ext.graph.fusion import installed
from bn_ext.graph.fusion.backends import run
from bn_ext.graph.fusion.rewrite import Fusion, rewrite

_SETTINGS = {
    "recompile_limit": 1 << 30,  # each instance of a class is captured
    "accumulated_recompile_limit": 1 << 30,  # the same, after captures of other models
    "specialize_float": True,  # the parameters of activations are known numbers
    "optimize_ddp": False,  # no graph is cut at the end of a bucket of gradients
    "suppress_errors": True,  # what cannot be captured runs as it is
    "skip_nnmodule_hook_guards": False,  # hooks may come and go
}
_ADVICE = (
    "a fused model is compiled by backend='bn_ext_inductor' or backend='bn_ext'; others take the model after "
    "bn_ext.revert"
)


class _Settings:
    """Dynamo's settings while fused models run. Calls may be nested, and in any number of threads."""

    def __init__(self) -> None:
        # Each thread has settings of its own in newer versions of torch; in older ones all threads share them.
        entry = torch._dynamo.config._config["recompile_limit"]  # type: ignore[attr-defined]
        is_per_thread = isinstance(getattr(entry, "user_override", None), ContextVar)
        self.own: Any = threading.local() if is_per_thread else SimpleNamespace()
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            running = getattr(self.own, "running", 0)
            if running == 0:
                self.own.patch = torch._dynamo.config.patch(_SETTINGS)
                self.own.patch.__enter__()
            self.own.running = running + 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.own.running -= 1
            if self.own.running == 0:
                self.own.patch.__exit__(None, None, None)


_settings = _Settings()
_MOST_CAPTURES = 64  # calls that capture, after which the model's Python code is taken to vary without end
_NO_MORE = f"the model runs as it is: its Python code varies without end, {_MOST_CAPTURES} calls had to be captured"
_UNCALLED = "no call of the fused model is captured yet: call the model once"
# Why: equal parts after graph breaks share a graph, which names the first part only; or the model did not call the
# batch norm; or Dynamo could not capture the code that calls it; or that code is not called by Python.
_UNSEEN = "in no graph of the model, unless an equal part's stands for it"
_numbers = itertools.count()


class _Captures:
    """The graphs that Dynamo captured of one model."""

    def __init__(self) -> None:
        self.fusions: Counter[Fusion] = Counter()
        self.graphs = 0
        self.codes: set[CodeType] = set()  # of the calls, and of what runs after a graph break
        self.calls = 0  # in which there was a graph to capture
        self.error: Exception | None = None  # the first of ours


class Fused(installed.Own):
    """The fused call of one model. It is where torch.nn.Module.compile puts a compiled call."""

    def __init__(self, model: nn.Module, only: str | None = None) -> None:
        super().__init__(model, "_call_impl")
        self.captures = _Captures()

        def call(*args: Any, **kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)

        # Dynamo keeps graphs by code object, and by its name what varied from call to call: every model has its own.
        call.__code__ = call.__code__.replace(co_name=f"call_{next(_numbers)}")
        backend = _backend(weakref.ref(model), self.captures, only)
        self.compiled = torch.compile(call, backend=backend)
        weakref.finalize(self, _forget, call.__code__, self.captures.codes, backend).atexit = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # the model is a part of what someone else compiles
            if not torch.compiler.is_exporting() and not _is_fusing():
                _refuse()
            return self.model._call_impl(*args, **kwargs)
        is_traced = (
            getattr(_symbolic_trace, "_is_fx_tracing_flag", False)
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()
        )
        if is_traced or _has_any_global_hook() or self.captures.calls >= _MOST_CAPTURES:
            return self.model._call_impl(*args, **kwargs)
        graphs = self.captures.graphs
        try:
            with _settings:
                return self.compiled(*args, **kwargs)
        finally:
            if self.captures.graphs > graphs:
                self.count()

    def count(self) -> None:
        """Counts a call that was captured."""
        self.captures.calls += 1
        if self.captures.calls == _MOST_CAPTURES:
            warnings.warn(f"bn_ext.fuse: {type(self.model).__name__}: {_NO_MORE}", stacklevel=4)

    def fusions(self) -> list[Fusion]:
        """Says what became of each call of a batch norm, and which batch norms were in no graph."""
        norms = [path for path, part in self.model.named_modules() if path and isinstance(part, _BatchNorm)]
        if self.captures.calls >= _MOST_CAPTURES:
            return [Fusion(path, (), _NO_MORE) for path in norms]
        named = {fusion.batch_norm for fusion in self.captures.fusions}
        error = self.captures.error
        reason = _UNSEEN if self.captures.graphs else _UNCALLED
        if error is not None:
            reason = f"a graph could not be rewritten: {error!r}"
        unseen = [Fusion(path, (), reason) for path in norms if path not in named]
        return [*self.captures.fusions.elements(), *unseen]


class _Compile(installed.Own):
    """``model.compile(...)`` of a fused model: by a backend that fuses, in the place of the fused call."""

    def __call__(self, *args: Any, backend: Any = "inductor", **options: Any) -> None:
        if not getattr(lookup_backend(backend), "fuses", False):
            raise RuntimeError(f"bn_ext.fuse: {_ADVICE}")
        installed.uninstall(self.model)
        self.model.compile(*args, backend=backend, **options)


def _backend(model: weakref.ref[nn.Module], captures: _Captures, only: str | None) -> Callable[..., Any]:
    """A backend. Dynamo keeps it forever, so it has no reference to the model."""

    def fuse(module: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        captures.graphs += 1
        captures.codes.add(InstructionTranslator.current_tx().output.root_tx.f_code)
        owner = model()
        names = {} if owner is None else {str(id(part)): path for path, part in owner.named_modules()}
        try:
            found = Counter(rewrite(module, names, only))
        except Exception as error:  # Dynamo suppresses it, and runs the captured code as it is
            captures.error = captures.error or error
            raise
        captures.fusions.update(found - captures.fusions)  # without those of earlier captures of the same code
        return run(module, inputs)

    fuse.fuses = True  # type: ignore[attr-defined]
    return fuse


def _forget(call: CodeType, codes: set[CodeType], backend: Callable[..., Any]) -> None:
    """Frees the graphs of a model. Dynamo keeps them by code objects: that of its call, and shared ones of classes."""
    reset_code(call)
    for code in codes - {call}:
        for entry in _debug_get_cache_entry_list(code):
            is_ours = getattr(getattr(entry, "backend", None), "compiler_fn", None) is backend
            if is_ours and (entries := entry.guard_manager.extra_state) is not None:
                entries.invalidate(entry, DeletedGuardManagerWrapper("the model is no longer fused"))


@torch.compiler.assume_constant_result
def _is_fusing() -> bool:
    """Whether the backend that Dynamo captures for is one that fuses."""
    backend = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None and not getattr(backend, "fuses", False):
        owner = getattr(backend, "__self__", None)  # DDP's
        wrapped = (getattr(backend, name, None) for name in ("_torchdynamo_orig_backend", "compiler_fn"))
        backend = next(filter(None, (*wrapped, getattr(owner, "backend_compile_fn", None))), None)
    return backend is not None


@torch.compiler.disable(reason=_ADVICE)
def _refuse() -> None:
    raise RuntimeError(f"bn_ext.fuse: {_ADVICE}")


def install(model: nn.Module, only: str | None = None) -> None:
    """Puts a fused call on ``model``; of one batch norm, if ``only`` names it."""
    installed.install(model, Fused(model, only), _Compile(model, "compile"))
