"""No timing without equal results: each peer against the float64 reference, on the scale of the baseline's error."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import Pass, Peer
from bench.workloads import Workload

# The largest error allowed, in errors of the baseline. One unit in the last place comes on top: of the result's own
# type for bn_ext, of the input's type for the others (Inductor rounds the gradients of float32 parameters to bfloat16).
TIMES_BASELINE = {True: 2.0, False: 16.0}


class WrongResultError(Exception):
    """The results are not those of batch normalization."""


def of_input_form(key: str) -> bool:
    """Whether a result has the form of the input, not of a parameter."""
    return key in ("output", "dx", "dresidual")


def observe(peer: Peer, workload: Workload, name: str) -> tuple[Pass, dict[str, float]]:
    """The pass as a call, and the errors of its results when it starts from the workload's running statistics."""
    with torch.no_grad():  # before the call is made: backward alone keeps a graph over them
        for mine, initial in zip(peer.running, (workload.running_mean, workload.running_var), strict=True):
            mine.copy_(initial)
    call = peer.call(name)
    result = call()
    tensors = (result,) if isinstance(result, Tensor) else result
    if name == "forward":
        tensors += peer.running
    dense = (t.detach().to_dense() if t.is_mkldnn else t.detach() for t in tensors)
    return call, errors(dict(zip(workload.expected[name], dense, strict=True)), workload, name)


def errors(results: dict[str, Tensor], workload: Workload, name: str) -> dict[str, float]:
    """Largest error of each result, relative to the largest value expected; raises WrongResultError on another form."""
    found = {}
    for key, expected in workload.expected[name].items():
        got, like = results[key], workload.input if of_input_form(key) else workload.weight
        if (got.shape, got.dtype, got.stride()) != (like.shape, like.dtype, like.stride()):
            raise WrongResultError(
                f"{key} is {got.dtype} {tuple(got.shape)} with strides {got.stride()}, unlike what it belongs to"
            )
        found[key] = _largest_error(got, expected)
    return found


def _largest_error(got: Tensor, expected: Tensor) -> float:
    """Works in slices: whole tensors in float64 would take far more memory than the measurement."""
    slices = list(zip(got.split(1), expected.split(1), strict=True)) if got.dim() > 1 else [(got, expected)]
    largest = max(float(e.abs().max()) for _, e in slices)
    worst = torch.stack([(g.double() - e).abs().max() for g, e in slices]).max()  # NaN stays NaN
    return float(worst) / largest


def compare(found: dict[str, float], baseline: dict[str, float], workload: Workload, strict: bool) -> None:
    """Raises WrongResultError where an error is larger than the baseline's error allows; ``strict`` is for bn_ext.

    The baseline itself must keep half of its type's digits: where it does not, the reference is wrong. So must
    the others, and no more where there is no baseline: it may not run here, or give another form.
    """
    for key, error in found.items():
        ulp = torch.finfo(torch.float32 if strict and not of_input_form(key) else workload.input.dtype).eps
        allowed = min(TIMES_BASELINE[strict] * baseline.get(key, 1.0) + ulp, ulp**0.5)
        if not error <= allowed:  # written so that NaN is refused
            raise WrongResultError(f"error of {key} is {error:.1e}, allowed is {allowed:.1e}")
