"""``python -m bn_ext`` says what is built and what runs it, and checks results in half a second."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch
from torch import Tensor

import bn_ext
from bn_ext import _C, _build_info, reference

# Errors that the self-check accepts, in roundings of the result's type at the result's largest value.
_ROUNDINGS = 8


def devices() -> list[torch.device]:
    """The CPU, and each GPU that torch sees if the kernels for it were built."""
    gpus = torch.cuda.device_count() if _build_info.cuda_architectures else 0
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(gpus))]


def without_kernels() -> list[str]:
    """The kinds of device that torch could use here, and on which our calls are torch's own."""
    kinds = [kind for kind in ("mps", "xpu") if (found := getattr(torch, kind, None)) and found.is_available()]
    return kinds + ["cuda"] * (torch.cuda.is_available() and not _build_info.cuda_architectures)


def facts() -> dict[str, str]:
    """One line for each thing that a report about a fault has to say."""
    built, running = _build_info.torch_version, torch.__version__
    architectures = ", ".join(_build_info.cuda_architectures)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "CUDA_VISIBLE_DEVICES")
    return {
        "bn_ext": f"{bn_ext.__version__}, commit {_build_info.commit}",
        "torch": f"{running}" + ("" if built == running else f", built against {built}"),
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "compiler": _build_info.compiler,
        "processor": f"{_processor()}, last cache {_C.last_cache_bytes() >> 20} MiB",
        "instruction sets": f"{_C.instruction_set()} in use, of {', '.join(_build_info.instruction_sets)}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "CUDA kernels": f"for {architectures}" if architectures else f"not built: {_build_info.without_cuda}",
        "GPUs": ", ".join(gpus) or "none",
        "left to torch": ", ".join(without_kernels()) or "no device",
        "environment": ", ".join(f"{n}={os.environ[n]}" for n in names if n in os.environ) or "nothing of account",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _rounding(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max() / torch.finfo(result.dtype).eps).item()


@torch.no_grad()
def _errors(x: Tensor, training: bool) -> dict[str, float]:
    """Of each result of silu(batch_norm(x) + residual), in roundings of its type at its largest value."""
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    weight, bias, mean, var = (torch.rand(x.size(1), device=x.device) + 0.5 for _ in range(4))
    exact = reference.results(x, residual, dy, (mean, var, weight, bias), training, 0.1, 1e-5, ("silu", 0.0))
    leaves = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
    for leaf in leaves.values():
        leaf.requires_grad_()
    options: dict[str, Any] = {"training": training, "residual": residual, "activation": "silu"}
    with torch.enable_grad():
        y = bn_ext.functional.batch_norm(x, mean, var, weight, bias, **options)
    results = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy)), output=y)
    results |= {"running_mean": mean, "running_var": var}
    return {name: _rounding(results[name], exact[name]) for name in exact}


def self_check(device: torch.device) -> list[str]:
    """Lists wrong results on ``device``, of both layouts in float32 and bfloat16, in both modes, against float64."""
    wrong = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            for training in (True, False):
                x = (torch.randn(8, 24, 9, 10, device=device) * 2 + 3).to(dtype).to(memory_format=layout)
                case = f"{device}, {dtype}, {layout}, {'training' if training else 'evaluation'}"
                found = _errors(x, training)
                wrong += [
                    f"{case}: {name} is off by {e:.0f} roundings" for name, e in found.items() if not e < _ROUNDINGS
                ]
    return wrong


def main() -> int:
    """Prints :func:`facts` and the self-check. Returns the exit status: 1 if something is wrong."""
    width = max(map(len, facts()))
    for name, value in facts().items():
        print(f"{name:<{width}}  {value}")
    begin, failed = time.perf_counter(), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for device in devices():
            try:
                failed += self_check(device)
            except Exception as error:  # a report about it is what this command is for
                failed.append(f"{device}: {type(error).__name__}: {error}")
    result = "failed" if failed else f"right on {', '.join(map(str, devices()))}"
    print(f"{'self-check':<{width}}  {result}, {time.perf_counter() - begin:.1f} s", *failed, sep="\n  ")
    print("\nTo report a fault, paste these lines, the call that fails and its whole message.")
    return 1 if failed else 0
